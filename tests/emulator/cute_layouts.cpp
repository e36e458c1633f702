// Prints where CuTe puts each element of each fragment: `name lane value index`, index = row +
// column * rows; for ldmatrix the index of a 16-bit element. Host code; compiled by nvcc for its
// include paths only.
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/tensor.hpp>

template <class Layout>
void print(const char* name, const char* part, Layout layout, int values, int step) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int v = 0; v < values; ++v) {
      std::printf("%s.%s %d %d %d\n", name, part, lane, v,
                  static_cast<int>(layout(lane, v * step)) / step);
    }
  }
}

template <class Operation>
void print_mma(const char* name, int a, int b) {
  using Traits = cute::MMA_Traits<Operation>;
  print(name, "a", typename Traits::ALayout{}, a, 1);
  print(name, "b", typename Traits::BLayout{}, b, 1);
  print(name, "acc", typename Traits::CLayout{}, 4, 1);
}

// Copy layouts count bits.
template <class Operation>
void print_ldmatrix(const char* name, int values) {
  using Traits = cute::Copy_Traits<Operation>;
  print(name, "from", typename Traits::SrcLayout{}, 8, 16);
  print(name, "to", typename Traits::DstLayout{}, values, 16);
}

int main() {
  print_mma<cute::SM80_16x8x32_S32S8S8S32_TN>("m16n8k32_s8", 16, 8);
  print_mma<cute::SM80_16x8x64_S32S4S4S32_TN>("m16n8k64_s4", 32, 16);
  print_mma<cute::SM80_16x8x16_F32F16F16F32_TN>("m16n8k16_f16", 8, 4);
  print_mma<cute::SM80_16x8x16_F32BF16BF16F32_TN>("m16n8k16_bf16", 8, 4);
  print_ldmatrix<cute::SM75_U32x4_LDSM_N>("x4", 8);
  print_ldmatrix<cute::SM75_U32x2_LDSM_N>("x2", 4);
  print_ldmatrix<cute::SM75_U16x8_LDSM_T>("x4_trans", 8);
}
