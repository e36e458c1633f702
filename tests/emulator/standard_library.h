// What the emulator and the kernels include of the standard library (build.py: precompiled).
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <source_location>
#include <string>
#include <type_traits>
#include <vector>
