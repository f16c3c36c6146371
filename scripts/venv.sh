# Sourced by the scripts beside it: venv FOLDER EXTRAS makes a virtual environment with pinned versions, or reuses
# one made from the same pins, and sets $py to its Python.
venv() {
    local folder="$1" extras="$2" stamp
    local python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "less-export needs Python 3.11 or newer: set PYTHON to one" >&2
        exit 1
    }
    py="$folder/bin/python"
    # The settings of the tools in pyproject.toml do not change what is installed.
    stamp="$("$python" --version) $PWD $extras $("$python" -c '
import pathlib, tomllib, zlib
facts = tomllib.loads(pathlib.Path("pyproject.toml").read_text())
packages = facts["build-system"], facts["project"], facts["tool"]["setuptools"]
pins = pathlib.Path("scripts/constraints.txt").read_text()
print(zlib.crc32(repr((packages, pins)).encode()))')"
    if [ "$(cat "$folder/.stamp" 2>/dev/null)" != "$stamp" ]; then
        echo "installing less-export[$extras] into $folder: the first time, this downloads about 1 GB"
        "$python" -m venv --clear "$folder"
        # -qq: errors only, without the remarks on package indexes, caches and pip's own version. --no-compile: Python
        # compiles what is imported, a small part of 20,000 files.
        local install=("$py" -m pip install -qq --no-compile --disable-pip-version-check -c scripts/constraints.txt)
        "${install[@]}" -e ".[$extras]"
        # TensorRT's headers; the packages that kernel-lens itself depends on (triton) are not needed for them.
        "${install[@]}" --no-deps kernel-lens
        echo "$stamp" >"$folder/.stamp"
    fi
}
