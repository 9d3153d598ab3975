// What this machine's vector units can do at most: multiply-adds on registers alone, as many at a time as keep every
// unit busy. Compiled for this machine by peak.py.
#if defined(__AVX512F__)
enum { kBytes = 64, kSums = 24 };  // of 32 registers
#elif defined(__AVX__)
enum { kBytes = 32, kSums = 12 };  // of 16
#elif defined(__aarch64__)
enum { kBytes = 16, kSums = 24 };  // of 32
#else
enum { kBytes = 16, kSums = 12 };  // of 16
#endif
enum { kLanes = kBytes / sizeof(float) };
typedef float Vector __attribute__((vector_size(kBytes)));

extern "C" double operations_of_round() { return 2.0 * kSums * kLanes; }

// The sum is returned so that it has to be computed.
extern "C" float multiply_adds(long long rounds) {
  Vector sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = Vector{} + static_cast<float>(i);
  const Vector factor = Vector{} + 0.5f, term = Vector{} + 1.0f;
  for (long long round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * factor + term;
  }
  Vector total = Vector{};
  for (int i = 0; i < kSums; ++i) total += sums[i];
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += total[i];
  return sum;
}
