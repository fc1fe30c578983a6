#pragma once

namespace resnet_fused {

enum class ElementType { float32, float64, bfloat16, float16 };

}  // namespace resnet_fused
