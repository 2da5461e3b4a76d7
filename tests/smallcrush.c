/* SmallCrush of TestU01 on interleaved streams of lfq: block b of every chain, then the next, over the trajectories of
 * one run. The argument: "words" as they are, "reversed" for their bits in reverse order, "repeated" for chains that all
 * have the stream of the first. Prints TestU01's summary, then the p-value and the name of each test. */
#include <lfq/lfq.h>
#include <stdio.h>
#include <string.h>
#include <testu01/bbattery.h>
#include <testu01/swrite.h>

enum { N_CHAINS = 64, N_BLOCKS = 16 };

static int repeated;

static unsigned word(void) {
  static uint32_t out[4];
  static uint64_t n;
  if (n % 4 == 0) {
    const uint64_t block = n / 4 / N_CHAINS;
    const uint32_t counter[4] = {(uint32_t)(block % N_BLOCKS), (uint32_t)(block / N_BLOCKS),
                                 repeated ? 0 : (uint32_t)(n / 4 % N_CHAINS), LFQ_PURPOSE_MOMENTA};
    const uint32_t key[2] = {7, 0};
    lfq_philox4x32(counter, key, out);
  }
  return out[n++ % 4];
}

static unsigned reversed_word(void) {
  unsigned in = word(), out = 0;
  for (int i = 0; i < 32; ++i, in >>= 1) out = out << 1 | (in & 1);
  return out;
}

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  repeated = !strcmp(argv[1], "repeated");
  swrite_Basic = FALSE;
  unif01_Gen* generator = unif01_CreateExternGenBits("lfq", strcmp(argv[1], "reversed") ? word : reversed_word);
  bbattery_SmallCrush(generator);
  for (int i = 0; i < bbattery_NTests; ++i) printf("p = %.17g: %s\n", bbattery_pVal[i], bbattery_TestNames[i]);
  unif01_DeleteExternGenBits(generator);
  return 0;
}
