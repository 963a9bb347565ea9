/* Decodes a box of a baseline or progressive JPEG to RGB, bit for bit as decoding all of it and cutting the box out.
 *
 * Lines above the box are entropy-decoded only, lines below are not read, and columns beside it are not transformed.
 * A margin of one iMCU around the box gives chroma upsampling the neighbours that it interpolates from.
 * Built by `python -m data_pipelines.roi`, called through ctypes, which releases the interpreter lock. */

#include <setjmp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

struct failure {
  struct jpeg_error_mgr base;
  jmp_buf escape;
};

static void leave(j_common_ptr decoder) { longjmp(((struct failure *)decoder->err)->escape, 1); }

/* A warning means damaged data: the caller decodes with a decoder that can judge it. */
static void stop_at_warning(j_common_ptr decoder, int level) {
  if (level < 0) leave(decoder);
}

/* Returns 0 and fills `out` (height x width x 3), or 1 when the box cannot be had this way. */
int roi_decode(const unsigned char *data, size_t size, int top, int left, int height, int width, unsigned char *out) {
  struct jpeg_decompress_struct decoder;
  struct failure failure;
  unsigned char *volatile line = NULL;

  decoder.err = jpeg_std_error(&failure.base);
  failure.base.error_exit = leave;
  failure.base.emit_message = stop_at_warning;
  if (setjmp(failure.escape)) {
    jpeg_destroy_decompress(&decoder);
    free(line);
    return 1;
  }
  jpeg_create_decompress(&decoder);
  jpeg_mem_src(&decoder, (unsigned char *)data, size);
  jpeg_read_header(&decoder, TRUE);
  decoder.out_color_space = JCS_RGB;
  jpeg_start_decompress(&decoder);

  int margin_x = decoder.max_h_samp_factor * DCTSIZE, margin_y = decoder.max_v_samp_factor * DCTSIZE;
  int full_width = (int)decoder.output_width, full_height = (int)decoder.output_height;
  if (top < 0 || left < 0 || height < 1 || width < 1 || top + height > full_height || left + width > full_width)
    leave((j_common_ptr)&decoder);
  JDIMENSION start_x = left > margin_x ? (JDIMENSION)(left - margin_x) : 0;
  int end_x = left + width + margin_x < full_width ? left + width + margin_x : full_width;
  JDIMENSION read_width = (JDIMENSION)end_x - start_x;
  jpeg_crop_scanline(&decoder, &start_x, &read_width);
  int start_y = (top > margin_y ? top - margin_y : 0) / margin_y * margin_y;
  if (start_y > 0 && jpeg_skip_scanlines(&decoder, (JDIMENSION)start_y) != (JDIMENSION)start_y)
    leave((j_common_ptr)&decoder);

  line = malloc((size_t)read_width * 3);
  if (!line) leave((j_common_ptr)&decoder);
  size_t row_bytes = (size_t)width * 3, shift = (size_t)(left - (int)start_x) * 3;
  for (int y = start_y; y < top + height; y++) {
    JSAMPROW row = line;
    jpeg_read_scanlines(&decoder, &row, 1);
    if (y >= top) memcpy(out + (size_t)(y - top) * row_bytes, line + shift, row_bytes);
  }
  jpeg_destroy_decompress(&decoder);
  free(line);
  return 0;
}
