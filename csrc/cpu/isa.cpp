#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace llmqat::cpu {
namespace {

constexpr int kUnset = -1;
std::atomic<int> g_isa{kUnset};

Isa parse(std::string_view name, const char* source) {
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512vnni}) {
    if (name != isa_name(isa)) continue;
    if (isa > detected_isa()) {
      throw std::runtime_error(std::string(source) + "=" + std::string(name) +
                               ": this CPU has only " + isa_name(detected_isa()) + " or less");
    }
    return isa;
  }
  throw std::runtime_error(std::string(source) + "=" + std::string(name) +
                           ": choose one of scalar, avx2, avx512vnni");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512vnni: return "avx512vnni";
    case Isa::avx2: return "avx2";
    default: return "scalar";
  }
}

Isa detected_isa() {
  static const Isa best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    return avx512 ? Isa::avx512vnni : avx2 ? Isa::avx2 : Isa::scalar;
  }();
  return best;
}

Isa current_isa() {
  int isa = g_isa.load(std::memory_order_relaxed);
  if (isa == kUnset) {
    const char* name = std::getenv("LLMQAT_CPU_ISA");
    const bool named = name != nullptr && *name != '\0';
    isa = static_cast<int>(named ? parse(name, "LLMQAT_CPU_ISA") : detected_isa());
    // Two threads may both get here; they store the same value.
    g_isa.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void set_isa(std::string_view name) {
  g_isa.store(static_cast<int>(parse(name, "set_isa")), std::memory_order_relaxed);
}

}  // namespace llmqat::cpu
