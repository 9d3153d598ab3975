// The closed-form sink of pseudo scores (MATH.md section 2), callable on host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define MODA_EXT_HOST_DEVICE __host__ __device__
#else
#define MODA_EXT_HOST_DEVICE
#endif

namespace moda_ext {

// c = base + log(sum_{t=1..remaining} exp(-(t-1) decay)), the logarithm of a row's pseudo scores, with remaining = n -
// i of them left:
//   base + log(expm1(-remaining decay) / expm1(-decay)),   decay > 0
//   base + log(remaining),                                 decay = 0
//   -inf                                                   remaining <= 0
// and remaining = infinity gives base - log(1 - exp(-decay)).
template <class T>
MODA_EXT_HOST_DEVICE inline T pseudo_score_sink(T base, T decay, int64_t remaining, bool infinite) {
  using std::expm1;
  using std::log;
  if (infinite) return base - log(-expm1(-decay));
  if (remaining <= 0) return -std::numeric_limits<T>::infinity();
  if (decay == T(0)) return base + log(static_cast<T>(remaining));
  // -expm1(-decay) underflows to a subnormal only where decay itself is one; the quotient is then remaining to first
  // order.
  return base + log(expm1(-static_cast<T>(remaining) * decay) / expm1(-decay));
}

// d c / d decay = remaining / expm1(remaining decay) - 1 / expm1(decay); the derivative with respect to base is 1 where
// c > -inf.
template <class T>
MODA_EXT_HOST_DEVICE inline T pseudo_score_sink_decay_grad(T decay, int64_t remaining, bool infinite) {
  using std::exp;
  using std::expm1;
  if (infinite) return T(-1) / expm1(decay);
  if (remaining <= 1) return T(0);
  const T count = static_cast<T>(remaining);
  const T x = count * decay;
  // The two terms cancel for small x; the series x / expm1(x) = 1 - x/2 + x^2/12 - x^4/720 + x^6/30240 + O(x^8) cancels
  // their poles 1/decay exactly.
  if (x < T(0.1)) {
    const T x2 = x * x, d2 = decay * decay;
    return T(-0.5) * (count - 1) + (count * x - decay) / T(12) - (count * x * x2 - decay * d2) / T(720) +
           (count * x * x2 * x2 - decay * d2 * d2) / T(30240);
  }
  return count / expm1(x) - T(1) / expm1(decay);
}

}  // namespace moda_ext
