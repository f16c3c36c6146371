#include "manifest.hpp"

#include <charconv>

#include "contract.hpp"
#include "schema.hpp"
#include "sha256.hpp"

namespace less {
namespace {

void checkFormat(int64_t version, std::string const& where) {
    std::string const label = where + " has format " + std::to_string(version);
    if (version > kNewestFormat) throw BundleError(label + ", written by a newer less-export: use a newer runtime");
    if (version < kOldestFormat) throw BundleError(label + ", which is no longer read: export again");
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

// The token ids in a list or of a single number; other values, and numbers that no token has, are ignored.
std::vector<int64_t> tokenIds(Json const& stated) {
    std::vector<int64_t> ids;
    Json::Array const* list = stated.as<Json::Array>();
    for (Json const& item : list ? *list : Json::Array{stated}) {
        auto const* number = item.as<Json::Number>();
        int64_t id = 0;
        if (!number) continue;
        char const* const last = number->text.data() + number->text.size();
        auto const [end, error] = std::from_chars(number->text.data(), last, id);
        if (error == std::errc() && end == last) ids.push_back(id);
    }
    return ids;
}

// Tokens that end a text: the tokenizer's; without one what the settings state, or the model's config.
std::vector<int64_t> eosIds(Json const& manifest) {
    if (Json const* tokenizer = manifest.find("tokenizer")) return tokenIds((*tokenizer)["eos_ids"]);
    Json::Object const& settings = manifest["settings"].object();
    if (auto const stated = settings.find("eos_ids"); stated != settings.end()) return tokenIds(stated->second);
    Json const* config = &manifest["model"]["config"];
    if (Json const* text = config->find("text_config"); text && !text->object().empty()) config = text;
    Json const* stated = config->find("eos_token_id");
    return stated ? tokenIds(*stated) : std::vector<int64_t>{};
}

}  // namespace

Json readManifest(std::string_view text, std::string const& where) {
    try {
        if (text.size() > kMaxManifestBytes) {
            throw JsonError("it has more than " + std::to_string(kMaxManifestBytes >> 20) + " MB");
        }
        Json manifest = Json::parse(text);
        headRule()(manifest, "");
        checkFormat(manifest["format_version"].integer(), where);
        if (sha256(manifest.canonical("manifest_sha256")) != manifest["manifest_sha256"].string()) {
            throw BundleError(where + " was changed after the export (its hash differs): export again");
        }
        manifestRule()(manifest, "");
        return manifest;
    } catch (JsonError const& error) {
        throw BundleError(where + " is not a usable manifest (" + error.what() + "): export again");
    }
}

Bundle describe(Json const& manifest, std::string const& where) {
    Json const* plan = nullptr;
    Bundle bundle;
    for (Json const& artifact : manifest["artifacts"].array()) {
        bool const chosen = !plan && artifact["kind"].string() == "plan";
        if (chosen) plan = &artifact;
        try {
            Contract contract = parseContract(artifact["contract"]);  // of graphs too: a manifest is whole or refused
            if (chosen) bundle.contract = std::move(contract);
        } catch (UsageError const& error) {
            throw BundleError(where + " has an impossible contract (" + error.what() + "): export the bundle again");
        }
    }
    if (!plan) throw BackendError("the bundle of " + where + " has no plan: export with --out x.plan or --engine");
    bundle.plan = (*plan)["file"].string();
    bundle.planSha256 = (*plan)["sha256"].string();
    if (Json const* plugin = (*plan)["details"].find("plugin")) {
        Json const* byIndex = plugin->find("rows_by_index");
        bundle.plugin = PluginFacts{(*plugin)["library"].string(), (*plugin)["sha256"].string(),
                                    (*plugin)["inside"].boolean(), byIndex && byIndex->boolean()};
    }
    bundle.identity = identityOf(manifest);
    bundle.modelName = manifest["model"]["name"].string();
    bundle.eosIds = eosIds(manifest);
    if (Json const* tokenizer = manifest.find("tokenizer")) {
        if (Json const* bos = tokenizer->find("bos_id")) bundle.bosId = bos->integer();
        bundle.addBos = (*tokenizer)["add_bos"].boolean();
    }
    return bundle;
}

}  // namespace less
