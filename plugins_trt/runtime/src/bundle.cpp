#include "files.hpp"
#include "less_runtime.hpp"
#include "manifest.hpp"
#include "plan_header.hpp"
#include "schema.hpp"
#include "sha256.hpp"
#include "trust.hpp"

namespace less {
namespace {

namespace fs = std::filesystem;

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

// Whether a file is a link out of its folder.
bool leaves(fs::path const& file, fs::path const& folder) {
    return fs::canonical(file).parent_path() != fs::canonical(folder.empty() ? "." : folder);
}

void checkPlan(Bundle& bundle, fs::path const& folder, bool verify) {
    std::string const again = ": export again, or copy the bundle again";
    if (!fs::is_regular_file(bundle.plan)) {
        throw BundleError(bundle.plan.string() + " is missing from the bundle" + again);
    }
    if (leaves(bundle.plan, folder)) {
        throw BundleError(bundle.plan.string() + " is a link to a file outside the bundle" + again);
    }
    MappedFile const file(bundle.plan);
    if (verify && sha256(file.view()) != bundle.planSha256) {
        throw BundleError(bundle.plan.string() + " is damaged (its hash differs from the manifest's)" + again);
    }
    bundle.header = readHeader(bundle.plan, file.view());
}

}  // namespace

Bundle Bundle::open(fs::path const& path, OpenOptions const& options) try {
    fs::path const manifest = manifestOf(path), folder = manifest.parent_path();
    if (!fs::is_regular_file(manifest)) {
        bool const exists = fs::exists(path);
        throw BundleError(path.string() + (exists ? " has no " + manifest.filename().string() : " does not exist") +
                          ": give a bundle folder, or a .plan made by less-export");
    }
    std::string const where = manifest.string();
    Bundle bundle = describe(readManifest(readFile(manifest, kMaxManifestBytes + 1), where), where);
    bundle.trustCode = options.trustCode;
    bundle.plan = folder / bundle.plan;
    if (bundle.plugin) bundle.plugin->library = folder / bundle.plugin->library;  // an absolute path stays as it is
    checkPlan(bundle, folder, options.verifyPlan);
    checkTrust(bundle);
    return bundle;
} catch (fs::filesystem_error const& error) {
    throw BundleError(std::string("cannot read the bundle: ") + error.what());
}

}  // namespace less
