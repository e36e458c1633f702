// The instruction set of the CPU operators, chosen once per process.
//
// Every operator has one function per instruction set, marked with __attribute__((target(...)))
// (the macros below), in one binary compiled without -march. All variants give the same bits.
#pragma once

#include <string_view>

#define LLMQAT_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define LLMQAT_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))

namespace llmqat::cpu {

enum class Isa { scalar = 0, avx2 = 1, avx512vnni = 2 };

// The best one that this machine has.
Isa detected_isa();

// The one in use: LLMQAT_CPU_ISA (scalar | avx2 | avx512vnni) if set, else detected_isa(). Throws
// std::runtime_error when the environment names an unknown one, or one this machine lacks.
Isa current_isa();

// Replaces the one in use, for every thread. Throws std::runtime_error as above.
void set_isa(std::string_view name);

const char* isa_name(Isa isa);

}  // namespace llmqat::cpu
