# Sourced by scripts/test and scripts/demo: venv FOLDER EXTRAS makes a virtual environment with pinned
# versions, or reuses one that the same pins made, and sets $py to its Python.
venv() {
    local folder="$1" extras="$2" stamp
    local python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "less-export needs Python 3.11 or newer; set PYTHON to one" >&2
        exit 1
    }
    py="$folder/bin/python"
    stamp="$("$python" --version) $extras $(cat pyproject.toml scripts/constraints.txt | cksum)"
    if [ "$(cat "$folder/.stamp" 2>/dev/null)" != "$stamp" ]; then
        echo "making $folder ($extras); this downloads about 1 GB the first time"
        rm -rf "$folder"
        "$python" -m venv "$folder"
        "$py" -m pip install -qq --disable-pip-version-check -c scripts/constraints.txt -e ".[$extras]"
        # TensorRT's headers; what the package itself depends on (triton) is not needed for them.
        "$py" -m pip install -qq --disable-pip-version-check -c scripts/constraints.txt --no-deps kernel-lens
        echo "$stamp" >"$folder/.stamp"
    fi
}
