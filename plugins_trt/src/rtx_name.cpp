#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <iterator>

#include "plugin_library.h"

namespace less {
namespace {

constexpr char const* kName = "libtensorrt_rtx.so";

// A shared library without code: a name (DT_SONAME), one dependency (DT_NEEDED) through which dlsym finds its symbols,
// and the empty tables that the loader requires.
struct Image {
    ElfW(Ehdr) header;
    ElfW(Phdr) segments[2];
    ElfW(Dyn) dynamic[8];
    ElfW(Sym) symbols[1];  // the null symbol
    uint32_t hash[4];      // one bucket and one chain entry, both empty
    char strings[256];
};

bool fill(Image& image, char const* dependency) {
    size_t const name = 1, needed = name + std::strlen(kName) + 1;
    if (needed + std::strlen(dependency) + 1 > sizeof(image.strings)) return false;
    std::strcpy(image.strings + name, kName);
    std::strcpy(image.strings + needed, dependency);

    ElfW(Ehdr) & header = image.header;
    std::memcpy(header.e_ident, ELFMAG, SELFMAG);
    header.e_ident[EI_CLASS] = sizeof(void*) == 8 ? ELFCLASS64 : ELFCLASS32;
    header.e_ident[EI_DATA] = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? ELFDATA2LSB : ELFDATA2MSB;
    header.e_ident[EI_VERSION] = EV_CURRENT;
    header.e_type = ET_DYN;
#if defined(__x86_64__)
    header.e_machine = EM_X86_64;
#elif defined(__aarch64__)
    header.e_machine = EM_AARCH64;
#else
    return false;
#endif
    header.e_version = EV_CURRENT;
    header.e_phoff = offsetof(Image, segments);
    header.e_ehsize = sizeof(header);
    header.e_phentsize = sizeof(ElfW(Phdr));
    header.e_phnum = 2;
    auto const segmentOf = [](uint32_t type, size_t offset, size_t size, size_t alignment) {
        ElfW(Phdr) segment{};
        segment.p_type = type;
        segment.p_flags = PF_R | PF_W;  // the loader writes addresses into the dynamic section
        segment.p_offset = segment.p_vaddr = segment.p_paddr = offset;
        segment.p_filesz = segment.p_memsz = size;
        segment.p_align = alignment;
        return segment;
    };
    image.segments[0] = segmentOf(PT_LOAD, 0, sizeof(Image), 0x10000);
    image.segments[1] = segmentOf(PT_DYNAMIC, offsetof(Image, dynamic), sizeof(image.dynamic), alignof(ElfW(Dyn)));
    size_t const entries[][2] = {{DT_SONAME, name},
                                 {DT_NEEDED, needed},
                                 {DT_STRTAB, offsetof(Image, strings)},
                                 {DT_STRSZ, sizeof(image.strings)},
                                 {DT_SYMTAB, offsetof(Image, symbols)},
                                 {DT_SYMENT, sizeof(ElfW(Sym))},
                                 {DT_HASH, offsetof(Image, hash)},
                                 {DT_NULL, 0}};
    for (size_t i = 0; i < std::size(entries); ++i) {
        image.dynamic[i].d_tag = static_cast<decltype(image.dynamic[i].d_tag)>(entries[i][0]);
        image.dynamic[i].d_un.d_val = entries[i][1];
    }
    image.hash[0] = image.hash[1] = 1;
    return true;
}

}  // namespace

void provideUnversionedName(char const* soname) noexcept {
    if (void* const loaded = dlopen(kName, RTLD_LAZY | RTLD_NOLOAD)) {
        dlclose(loaded);
        return;
    }
    Image image{};
    int const file = fill(image, soname) ? memfd_create(kName, MFD_CLOEXEC) : -1;
    if (file < 0) return;
    if (write(file, &image, sizeof(image)) == static_cast<ssize_t>(sizeof(image))) {
        char path[32];
        std::snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
        dlopen(path, RTLD_LAZY | RTLD_LOCAL);  // stays open, and is found by its name from now on
    }
    close(file);
}

}  // namespace less
