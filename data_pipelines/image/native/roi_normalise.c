/* Bytes to normalised floats in one pass: the operations of torch's div_(255).sub_(mean).div_(std), and so its bits. */

#include <stddef.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(ROI_PLAIN)
#define FASTEST_CLONE __attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3")))
#else
#define FASTEST_CLONE
#endif

FASTEST_CLONE
static void normalise_plane(const unsigned char *pixels, size_t count, float mean, float std, float *out) {
  for (size_t i = 0; i < count; i++) out[i] = ((float)pixels[i] / 255.0f - mean) / std;
}

/* `num_planes` planes of `count` bytes each, plane p with the mean and deviation p % `num_channels`. */
void roi_normalise(const unsigned char *pixels, size_t num_planes, size_t count, const float *mean, const float *std,
                   int num_channels, float *out) {
  for (size_t plane = 0; plane < num_planes; plane++) {
    size_t channel = plane % (size_t)num_channels;
    normalise_plane(pixels + plane * count, count, mean[channel], std[channel], out + plane * count);
  }
}
