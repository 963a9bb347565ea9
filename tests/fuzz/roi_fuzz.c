/* Fuzz target: views by roi_view against the whole image as libjpeg-turbo decodes it, resized plainly.
 *
 * An input is 12 bytes that choose the view, then a JPEG. Of an image that libjpeg-turbo decodes without a warning every
 * view must be had, with the bytes of the whole image; of any other, no memory may be read or written that is not its
 * own. Built and run by tests/data/test_fuzz_roi.py. */

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#include "roi_resize.h"

#define VIEW_BYTES 12
#define MAX_PIXELS (1 << 18)

int roi_view(const unsigned char *data, size_t size, const int *view, unsigned char *out);

struct failure {
  struct jpeg_error_mgr base;
  jmp_buf escape;
};

static void leave(j_common_ptr decoder) { longjmp(((struct failure *)decoder->err)->escape, 1); }

static void stop_at_warning(j_common_ptr decoder, int level) {
  if (level < 0) leave(decoder);
}

/* RGB pixels of the whole image, or NULL where libjpeg-turbo complains or leaves scans to guess. */
static unsigned char *decode_whole(const uint8_t *data, size_t size, int *height, int *width) {
  struct jpeg_decompress_struct decoder;
  struct failure failure;
  unsigned char *volatile pixels = NULL;
  decoder.err = jpeg_std_error(&failure.base);
  failure.base.error_exit = leave;
  failure.base.emit_message = stop_at_warning;
  *height = *width = 0;
  if (setjmp(failure.escape)) {
    jpeg_destroy_decompress(&decoder);
    free(pixels);
    return NULL;
  }
  jpeg_create_decompress(&decoder);
  jpeg_mem_src(&decoder, (unsigned char *)data, size);
  jpeg_read_header(&decoder, TRUE);
  *height = (int)decoder.image_height;
  *width = (int)decoder.image_width;
  if ((uint64_t)*height * (uint64_t)*width > MAX_PIXELS) leave((j_common_ptr)&decoder);
  decoder.out_color_space = JCS_RGB;
  jpeg_start_decompress(&decoder);
  for (int i = 0; decoder.progressive_mode && i < decoder.num_components * DCTSIZE2; i++)
    if (decoder.coef_bits[i / DCTSIZE2][i % DCTSIZE2] != 0) leave((j_common_ptr)&decoder);
  pixels = malloc((size_t)*height * (size_t)*width * 3);
  while (decoder.output_scanline < decoder.output_height) {
    JSAMPROW row = pixels + (size_t)decoder.output_scanline * (size_t)*width * 3;
    jpeg_read_scanlines(&decoder, &row, 1);
  }
  jpeg_finish_decompress(&decoder);
  jpeg_destroy_decompress(&decoder);
  return pixels;
}

static int weighed(const struct axis *axis, int place, const unsigned char *pixels, int step) {
  int sum = 1 << (axis->precision - 1);
  for (int j = 0; j < axis->count[place]; j++)
    sum += axis->weights[place * axis->taps + j] * pixels[(axis->first[place] + j) * step];
  sum >>= axis->precision;
  return sum < 0 ? 0 : sum > 255 ? 255 : sum;
}

static void resize_plainly(const unsigned char *pixels, int full_width, const int *view, unsigned char *out) {
  int top = view[0], left = view[1], height = view[2], width = view[3], size = view[5];
  void *memory_across = malloc(axis_bytes(width, size, view[6])), *memory_down = malloc(axis_bytes(height, size, view[6]));
  unsigned char *lines = malloc((size_t)height * (size_t)size);
  struct axis across, down;
  axis_fill(&across, memory_across, width, size, view[6], view[4]);
  axis_fill(&down, memory_down, height, size, view[6], 0);
  for (int channel = 0; channel < 3; channel++) {
    for (int y = 0; y < height; y++)
      for (int x = 0; x < size; x++)
        lines[y * size + x] =
            (unsigned char)weighed(&across, x, pixels + ((size_t)(top + y) * full_width + left) * 3 + channel, 3);
    for (int y = 0; y < size; y++)
      for (int x = 0; x < size; x++)
        out[(channel * size + y) * size + x] = (unsigned char)weighed(&down, y, lines + x, size);
  }
  free(lines);
  free(memory_across);
  free(memory_down);
}

static int word(const uint8_t *data) { return data[0] | data[1] << 8; }

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size < VIEW_BYTES) return 0;
  const uint8_t *jpeg = data + VIEW_BYTES;
  size_t jpeg_size = size - VIEW_BYTES;
  int height, width, view[7];
  unsigned char *whole = decode_whole(jpeg, jpeg_size, &height, &width);
  if (height < 1 || width < 1 || (uint64_t)height * (uint64_t)width > MAX_PIXELS) return 0;
  view[0] = word(data) % height;
  view[1] = word(data + 2) % width;
  view[2] = 1 + word(data + 4) % (height - view[0]);
  view[3] = 1 + word(data + 6) % (width - view[1]);
  view[4] = data[8] & 1;
  view[5] = 1 + data[9] % 96;
  view[6] = data[10] & 1;
  size_t out_bytes = 3 * (size_t)view[5] * (size_t)view[5];
  unsigned char *got = malloc(out_bytes), *expected = malloc(out_bytes);
  int failed = roi_view(jpeg, jpeg_size, view, got);
  if (whole) {
    resize_plainly(whole, width, view, expected);
    if (failed || memcmp(got, expected, out_bytes)) {
      fprintf(stderr, "view %d %d %d %d of %d x %d: %s\n", view[0], view[1], view[2], view[3], height, width,
              failed ? "not had" : "other pixels");
      abort();
    }
  }
  free(got);
  free(expected);
  free(whole);
  return 0;
}
