#include "contract.hpp"
#include "files.hpp"
#include "json.hpp"
#include "less_runtime.hpp"
#include "plan_header.hpp"

namespace less {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kFormatVersion = 1;
constexpr char const* kManifest = "manifest.json";
constexpr char const* kPlan = "engine.plan";

// The path of a bundle's manifest, which may not exist.
fs::path manifestOf(fs::path const& path) {
    fs::path const suffix = path.extension();
    if (fs::is_directory(path)) return path / kManifest;
    if (suffix != ".plan" && suffix != ".engine") {
        if (!fs::exists(path)) throw BundleError(path.string() + " does not exist: give a bundle folder or a .plan");
        throw BundleError(path.string() + " is not a bundle: give a bundle folder, or a .plan made by less-export");
    }
    fs::path const beside = path.parent_path() / kManifest;
    if (path.filename() == kPlan && fs::is_regular_file(beside)) return beside;
    return fs::path(path).replace_extension(".json");
}

std::string identityOf(Json const& manifest) {
    Json const* kernels = manifest.find("kernels");
    std::string text = "{\"kernels\": " + (kernels ? (*kernels)["sha256"].canonical() : "null");
    text += ", \"model\": " + manifest["model"].canonical() + ", \"weights\": [";
    char const* separator = "";
    for (Json const& weight : manifest["weights"].array()) {
        text += separator + weight["sha256"].canonical();
        separator = ", ";
    }
    return sha256(text + "]}");
}

std::optional<PluginFacts> pluginOf(Json const& details, fs::path const& folder) {
    Json const* plugin = details.find("plugin");
    if (!plugin) return std::nullopt;
    PluginFacts facts{{}, (*plugin)["sha256"].string(), (*plugin)["inside"].boolean()};
    if (facts.inside) return facts;
    facts.library = folder / (*plugin)["library"].string();  // an absolute path stays as it is
    if (!fs::is_regular_file(facts.library)) {
        throw BundleError("the plan needs the plugin " + facts.library.string() +
                          ", which is missing: copy it there, or export again");
    }
    if (sha256(MappedFile(facts.library).view()) != facts.sha256) {
        throw BundleError("the plugin " + facts.library.string() +
                          " is not the one that the plan was built with (its hash differs): build the plan again");
    }
    return facts;
}

Bundle read(Json const& manifest, fs::path const& path, bool verifyPlan) {
    fs::path const folder = path.parent_path();
    Json const* plan = nullptr;
    for (Json const& artifact : manifest["artifacts"].array()) {
        if (artifact["kind"].string() == "plan") plan = &artifact;
    }
    if (!plan) {
        throw BackendError("the bundle of " + path.string() + " has no plan: export with --out x.plan or --engine");
    }
    Bundle bundle;
    bundle.plan = folder / (*plan)["file"].string();
    if (!fs::is_regular_file(bundle.plan)) {
        throw BundleError(bundle.plan.string() + " is missing from the bundle: export again, or copy the bundle again");
    }
    MappedFile const file(bundle.plan);
    if (verifyPlan && sha256(file.view()) != (*plan)["sha256"].string()) {
        throw BundleError(bundle.plan.string() +
                          " is damaged (its hash differs from the manifest's): export again, or copy the bundle again");
    }
    bundle.header = readHeader(bundle.plan, file.view());
    try {
        bundle.contract = parseContract((*plan)["contract"]);
    } catch (std::exception const& error) {
        throw BundleError(std::string("the manifest's contract is damaged (") + error.what() +
                          "): export the bundle again");
    }
    bundle.plugin = pluginOf((*plan)["details"], folder);
    bundle.identity = identityOf(manifest);
    if (Json const* name = manifest["model"].find("name")) bundle.modelName = name->string();
    if (Json const* tokenizer = manifest.find("tokenizer")) {
        for (Json const& id : (*tokenizer)["eos_ids"].array()) bundle.eosIds.push_back(id.integer());
        if (Json const* bos = tokenizer->find("bos_id")) bundle.bosId = bos->integer();
        bundle.addBos = (*tokenizer)["add_bos"].boolean();
    }
    return bundle;
}

}  // namespace

Bundle Bundle::open(fs::path const& path, bool verifyPlan) try {
    fs::path const manifestPath = manifestOf(path);
    if (!fs::is_regular_file(manifestPath)) {
        bool const exists = fs::exists(path);
        throw BundleError(path.string() + (exists ? " has no " + manifestPath.filename().string() : " does not exist") +
                          ": give a bundle folder, or a .plan made by less-export");
    }
    try {
        Json const manifest = Json::parse(MappedFile(manifestPath).view());
        int64_t const version = manifest["format_version"].integer();
        if (version > kFormatVersion) {
            throw BundleError(manifestPath.string() + " has format " + std::to_string(version) +
                              ", written by a newer less-export: use a newer runtime");
        }
        if (sha256(manifest.without("manifest_sha256").canonical()) != manifest["manifest_sha256"].string()) {
            throw BundleError(manifestPath.string() + " was changed after the export (its hash differs): export again");
        }
        return read(manifest, manifestPath, verifyPlan);
    } catch (JsonError const& error) {
        throw BundleError(manifestPath.string() + " is not a usable manifest (" + error.what() + "): export again");
    }
} catch (fs::filesystem_error const& error) {
    throw BundleError(std::string("cannot read the bundle: ") + error.what());
}

}  // namespace less
