// The dtypes of the CPU kernels, as plain numbers that kernel files can see without torch.
#pragma once

namespace xattn {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace xattn
