// Takes the place of the system's header: what csrc looks up in torch, the current stream, is the
// emulator's.
#pragma once

#include_next <dlfcn.h>

#include <cstdint>

namespace emulated {
int32_t current_stream(int32_t device, void** stream);
}  // namespace emulated

#define dlopen(...) nullptr
#define dlsym(...) reinterpret_cast<void*>(&emulated::current_stream)
