#include "capability.h"

#include <cstdlib>
#include <stdexcept>

namespace resnet_fused {
namespace {

struct Capability {
  std::string name;
  bool supported;
  const Kernels& (*kernels)(ElementType);
};

// The widest last.
const Capability kCapabilities[] = {
    {"baseline", true, baseline::kernels},
#if defined(__x86_64__)
    {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
     avx2::kernels},
    {"avx512",
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl"),
     avx512::kernels},
#endif
};

const Capability& choose() {
  const char* asked = std::getenv("RESNET_FUSED_CPU_CAPABILITY");
  const Capability* widest = nullptr;
  std::string supported;
  for (const Capability& capability : kCapabilities) {
    if (!capability.supported) continue;
    if (asked != nullptr && asked == capability.name) return capability;
    supported += (supported.empty() ? "" : ", ") + capability.name;
    widest = &capability;
  }
  if (asked != nullptr && *asked != '\0') {
    throw std::invalid_argument("RESNET_FUSED_CPU_CAPABILITY: expected one that this CPU and build have (" + supported +
                                "), or none for the widest, got '" + asked + "'");
  }
  return *widest;
}

const Capability& chosen() {
  static const Capability& capability = choose();
  return capability;
}

}  // namespace

const std::string& cpu_capability() { return chosen().name; }

const Kernels& kernels(ElementType type) { return chosen().kernels(type); }

}  // namespace resnet_fused
