// The weights of a depthwise convolution, as host and kernel files both see them.
#pragma once

#include <stdint.h>

namespace xattn {

// Channel c has a square window of window[c] x window[c] values, odd, at weight + offset[c].
struct DepthwiseWeights {
  const void* weight;
  const void* bias;  // [channels], or null
  const int64_t* window;
  const int64_t* offset;
  int64_t largest;  // window of all channels; 0 where there is no convolution
};

}  // namespace xattn
