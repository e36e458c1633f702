// Includes the file LLMQAT_KERNEL once per instruction set, inside llmqat::cpu::<isa>, so that a
// kernel is written once in terms of simd.h and compiled three times into one binary.
//
// In that file LLMQAT_SIMD marks every function. No lambdas there: they would not inherit the
// target. No include guard here: each op's .cpp includes this once, after simd.h and everything the
// kernel needs.

namespace llmqat::cpu::scalar {
namespace {
#define LLMQAT_SIMD
#include LLMQAT_KERNEL
#undef LLMQAT_SIMD
}  // namespace
}  // namespace llmqat::cpu::scalar

namespace llmqat::cpu::avx2 {
namespace {
#define LLMQAT_SIMD LLMQAT_TARGET_AVX2
#include LLMQAT_KERNEL
#undef LLMQAT_SIMD
}  // namespace
}  // namespace llmqat::cpu::avx2

namespace llmqat::cpu::avx512 {
namespace {
#define LLMQAT_SIMD LLMQAT_TARGET_AVX512
#include LLMQAT_KERNEL
#undef LLMQAT_SIMD
}  // namespace
}  // namespace llmqat::cpu::avx512

#undef LLMQAT_KERNEL
