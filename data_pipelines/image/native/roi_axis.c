/* The weights of separable resizing along one axis: the filters of Pillow, rounded to 16 bits as torch's uint8 kernel
 * rounds them, and laid out for the instructions of roi_resize.c. */

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "roi_resize.h"

static double triangle(double x) {
  x = fabs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

/* Keys' cubic with a = -0.5. */
static double keys(double x) {
  const double a = -0.5;
  x = fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  if (x < 2.0) return ((x - 5.0) * x + 8.0) * x * a - 4.0 * a;
  return 0.0;
}

/* Half the width of the filter, in pixels of the box. */
static double support_of(int in, int out, int cubic) {
  double scale = (double)in / out;
  return (cubic ? 2.0 : 1.0) * (scale > 1.0 ? scale : 1.0);
}

/* Where the filter of output pixel `i` begins; how many pixels it counts. */
static int window_of(int i, int in, int out, int cubic, int *count) {
  double centre = (double)in / out * (i + 0.5), support = support_of(in, out, cubic);
  int first = centre - support + 0.5 > 0.0 ? (int)(centre - support + 0.5) : 0;
  int end = (int)(centre + support + 0.5);
  *count = (end < in ? end : in) - first;
  return first;
}

/* Rounded up to a multiple of 4, as many as one instruction weighs. */
static int taps_of(int in, int out, int cubic) {
  int most = 1, count;
  for (int i = 0; i < out; i++) {
    window_of(i, in, out, cubic, &count);
    if (count > most) most = count;
  }
  return (most + 3) / 4 * 4;
}

/* Places are rounded up to a multiple of 4 too; those that are too many have weights of zero. */
static size_t places_of(int out) { return ((size_t)out + 3) / 4 * 4; }

size_t axis_bytes(int in, int out, int cubic) {
  size_t taps = (size_t)taps_of(in, out, cubic);
  return places_of(out) * (2 * sizeof(int) + taps * (sizeof(int16_t) + sizeof(double)));
}

/* As many bits as the largest weight leaves room for in 16. */
static int precision_of(double largest) {
  int precision = 0;
  while (precision < 22 && (int)(0.5 + largest * (1 << (precision + 1))) < 1 << 15) precision++;
  return precision;
}

void axis_fill(struct axis *axis, void *memory, int in, int out, int cubic, int flip) {
  double scale = (double)in / out, inverse = scale > 1.0 ? 1.0 / scale : 1.0, largest = 0.0;
  size_t taps = (size_t)taps_of(in, out, cubic), places = places_of(out);
  double *exact = memory;
  memset(memory, 0, axis_bytes(in, out, cubic));
  axis->num_places = out;
  axis->taps = (int)taps;
  axis->first = (int *)(exact + places * taps);
  axis->count = axis->first + places;
  axis->weights = (int16_t *)(axis->count + places);
  for (int i = 0; i < out; i++) {
    int place = flip ? out - 1 - i : i, count, first = window_of(i, in, out, cubic, &count);
    double total = 0.0, *weights = exact + (size_t)place * taps;
    axis->first[place] = first;
    axis->count[place] = count;
    for (int j = 0; j < count; j++) {
      double x = (j + first - scale * (i + 0.5) + 0.5) * inverse;
      weights[j] = cubic ? keys(x) : triangle(x);
      total += weights[j];
    }
    for (int j = 0; j < count; j++) {
      if (total != 0.0) weights[j] /= total;
      if (weights[j] > largest) largest = weights[j];
    }
  }
  axis->precision = precision_of(largest);
  for (size_t j = 0; j < places * taps; j++) {
    double weight = exact[j] * (1 << axis->precision);
    axis->weights[j] = (int16_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
  }
}
