/* Antialiased resizing of a box, row by row as it is decoded, to planes of bytes: the bits of torch's uint8 kernel. */

#ifndef ROI_RESIZE_H
#define ROI_RESIZE_H

#include <stdint.h>

/* For each place of one axis of the output: the first pixel of the box, how many count, and their weights of 16 bits.
 * Each place has `taps` weights, a multiple of 4, of which the last are zero. */
struct axis {
  int num_places, taps, precision;
  int *first, *count;
  int16_t *weights;
};

/* Fills `axis` for `in` pixels that become `out`. `flip` reverses the places. `memory` is of axis_bytes. */
size_t axis_bytes(int in, int out, int cubic);
void axis_fill(struct axis *axis, void *memory, int in, int out, int cubic, int flip);

/* One line of RGB pixels to three planes of `plane_stride` bytes each, one behind another. Reads up to 3 * taps bytes
 * and 16 behind the line. `plane_stride` is the number of places, rounded up to a multiple of 16. */
void resize_line(const struct axis *across, const unsigned char *line, unsigned char *planes, int plane_stride);

/* The lines that one place of `down` weighs, an even number of them, to `width` bytes. Reads 16 bytes at a time. */
void resize_down(const struct axis *down, int place, const unsigned char *const *lines, int width, unsigned char *out);

#endif
