/* A faster Huffman decoder for baseline JPEG, put in the place of libjpeg-turbo's own. */

#ifndef ROI_ENTROPY_H
#define ROI_ENTROPY_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <jpeglib.h>

/* Codes of up to this length are found by one look into a table. */
#define ROI_LOOKUP_BITS 11

/* The codes of one Huffman table: what each look says, and for each length of code the first that is longer,
 * left-justified in 16 bits, and where its symbols are. */
struct codes {
  JHUFF_TBL table;
  int is_filled;
  uint32_t looks[1 << ROI_LOOKUP_BITS], limit[18];
  int offset[17];
};

/* The next bits of the scan, left-justified, and where those behind them are. */
struct bits {
  uint64_t window;
  int count;
  const unsigned char *next;
};

struct entropy {
  struct bits bits;
  const unsigned char *end;
  int last_dc[MAX_COMPS_IN_SCAN];
  struct codes dc[NUM_HUFF_TBLS], ac[NUM_HUFF_TBLS];
};

/* Attaches to a decoder after jpeg_start_decompress, before a line is read. Leaves it as it is, and returns 0, unless
 * the image is baseline with one scan, without restarts, and in memory. Broken data ends in the error_exit of the
 * decoder. One image at a time in each thread; the decoder's client_data is used. */
int entropy_attach(j_decompress_ptr decoder);

#endif
