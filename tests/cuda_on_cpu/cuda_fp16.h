// float16 as storage.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const uint32_t exponent = value.bits >> 10 & 31, mantissa = value.bits & 0x3ff;
  float magnitude = ldexpf(static_cast<float>(mantissa), -24);  // subnormal
  if (exponent != 0) {
    const uint32_t rebiased = exponent == 31 ? 255 : exponent + 112;
    const uint32_t bits = rebiased << 23 | mantissa << 13;
    std::memcpy(&magnitude, &bits, sizeof(magnitude));
  }
  return value.bits >> 15 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float value) {
  uint32_t bits, magnitude;
  std::memcpy(&bits, &value, sizeof(bits));
  magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};  // NaN
  uint32_t rounded;
  if (magnitude < 113u << 23) {
    rounded = static_cast<uint32_t>(nearbyintf(ldexpf(fabsf(value), 24)));  // subnormal, a multiple of 2^-24
  } else {
    const uint32_t rebiased = magnitude - (112u << 23);
    rounded = (rebiased + 0xfffu + (rebiased >> 13 & 1u)) >> 13;  // to nearest, ties to even
    if (rounded > 0x7c00u) rounded = 0x7c00u;
  }
  return {static_cast<uint16_t>(rounded | bits >> 31 << 15)};
}
