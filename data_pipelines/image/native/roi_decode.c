/* The view of a JPEG that training sees: the box, decoded and resized, bit for bit as decoding all of the image,
 * cutting the box out and resizing it with torch.
 *
 * Lines above the box are entropy-decoded only, lines below are not read, and columns beside it are not transformed.
 * A margin of one iMCU around the box gives chroma upsampling the neighbours that it interpolates from. Of
 * libjpeg-turbo only the public interface is used.
 * Built by `python -m data_pipelines.image.native.library`, called through ctypes, which releases the interpreter lock. */

#include <setjmp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#include "roi_resize.h"

struct failure {
  struct jpeg_error_mgr base;
  jmp_buf escape;
};

/* What is wanted: a box of the image, and the side of the square that it becomes. */
struct view {
  int top, left, height, width, flip, size, cubic;
};

static void leave(j_common_ptr decoder) { longjmp(((struct failure *)decoder->err)->escape, 1); }

/* A warning means damaged data: the caller decodes with a decoder that can judge it. */
static void stop_at_warning(j_common_ptr decoder, int level) {
  if (level < 0) leave(decoder);
}

/* Memory that the decoder frees when it is destroyed. */
static void *memory_of(j_decompress_ptr decoder, size_t bytes) {
  return decoder->mem->alloc_large((j_common_ptr)decoder, JPOOL_IMAGE, bytes);
}

/* The last lines that were resized across, in a ring, and the next place of the output that they make. */
struct lines {
  const struct axis *down;
  size_t stride;
  unsigned char *ring, *out;
  const unsigned char **rows;
  int place;
};

/* Writes those places of the output whose last line is line `number` of the box, or before. */
static void write_places(struct lines *lines, int number) {
  const struct axis *down = lines->down;
  size_t size = (size_t)down->num_places;
  for (; lines->place < down->num_places; lines->place++) {
    int first = down->first[lines->place], count = down->count[lines->place];
    if (first + count - 1 > number) return;
    for (int channel = 0; channel < 3; channel++) {
      /* Two lines are weighed at once: a line behind the last has no weight, and may be any. */
      for (int j = 0; j < down->taps; j++)
        lines->rows[j] = lines->ring + ((size_t)((first + (j < count ? j : 0)) % down->taps) * 3 + channel) * lines->stride;
      resize_down(down, lines->place, lines->rows, (int)size, lines->out + (channel * size + lines->place) * size);
    }
  }
}

/* A progressive image that lacks scans is smoothed, by each version of libjpeg-turbo in its own way. */
static void leave_unless_complete(j_decompress_ptr decoder) {
  for (int i = 0; decoder->progressive_mode && i < decoder->num_components * DCTSIZE2; i++)
    if (decoder->coef_bits[i / DCTSIZE2][i % DCTSIZE2] != 0) leave((j_common_ptr)decoder);
}

static void read_view(j_decompress_ptr decoder, const struct view *view, unsigned char *out) {
  int margin_x = decoder->max_h_samp_factor * DCTSIZE, margin_y = decoder->max_v_samp_factor * DCTSIZE;
  int full_width = (int)decoder->output_width, full_height = (int)decoder->output_height;
  if (view->top < 0 || view->left < 0 || view->height < 1 || view->width < 1 || view->size < 1 ||
      view->height > full_height - view->top || view->width > full_width - view->left)
    leave((j_common_ptr)decoder);
  int bottom = view->top + view->height, right = view->left + view->width;
  JDIMENSION start_x = view->left > margin_x ? (JDIMENSION)(view->left - margin_x) : 0;
  JDIMENSION read_width = (JDIMENSION)(right + margin_x < full_width ? right + margin_x : full_width) - start_x;
  jpeg_crop_scanline(decoder, &start_x, &read_width);
  int start_y = (view->top > margin_y ? view->top - margin_y : 0) / margin_y * margin_y;
  if (start_y > 0 && jpeg_skip_scanlines(decoder, (JDIMENSION)start_y) != (JDIMENSION)start_y)
    leave((j_common_ptr)decoder);

  struct axis across, down;
  axis_fill(&across, memory_of(decoder, axis_bytes(view->width, view->size, view->cubic)), view->width, view->size,
            view->cubic, view->flip);
  axis_fill(&down, memory_of(decoder, axis_bytes(view->height, view->size, view->cubic)), view->height, view->size,
            view->cubic, 0);
  size_t stride = ((size_t)view->size + 15) / 16 * 16, shift = (size_t)(view->left - (int)start_x) * 3;
  size_t line_bytes = (size_t)read_width * 3 + 3 * (size_t)across.taps + 128;
  struct lines lines = {.down = &down, .stride = stride, .out = out};
  unsigned char *line = memset(memory_of(decoder, line_bytes), 0, line_bytes);
  lines.ring = memory_of(decoder, (size_t)down.taps * stride * 3);
  lines.rows = memory_of(decoder, (size_t)down.taps * sizeof(unsigned char *));
  for (int y = start_y; y < bottom; y++) {
    JSAMPROW row = line;
    jpeg_read_scanlines(decoder, &row, 1);
    if (y < view->top) continue;
    int number = y - view->top;
    resize_line(&across, line + shift, lines.ring + (size_t)(number % down.taps) * stride * 3, (int)stride);
    write_places(&lines, number);
  }
}

/* Returns 0 and fills `out` (3 x size x size), or 1 when the view cannot be had this way. */
int roi_view(const unsigned char *data, size_t size, const struct view *view, unsigned char *out) {
  struct jpeg_decompress_struct decoder;
  struct failure failure;

  decoder.err = jpeg_std_error(&failure.base);
  failure.base.error_exit = leave;
  failure.base.emit_message = stop_at_warning;
  if (setjmp(failure.escape)) {
    jpeg_destroy_decompress(&decoder);
    return 1;
  }
  jpeg_create_decompress(&decoder);
  jpeg_mem_src(&decoder, (unsigned char *)data, size);
  jpeg_read_header(&decoder, TRUE);
  decoder.out_color_space = JCS_RGB;
  jpeg_start_decompress(&decoder);
  leave_unless_complete(&decoder);
  read_view(&decoder, view, out);
  jpeg_destroy_decompress(&decoder);
  return 0;
}
