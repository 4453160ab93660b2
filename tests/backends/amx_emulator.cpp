// AMX on a machine without it: a handler of SIGILL that carries out the instructions the kernels use,
// as the Intel 64 and IA-32 Architectures Software Developer's Manual describes them. For tests only.
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

struct Tile {
  int rows = 0, column_bytes = 0;
  alignas(64) unsigned char data[16][64] = {};
};
// Written and read on the thread that executes the instruction.
thread_local Tile tiles[8];

void fail(const char* reason) {
  // a fault on a real machine
  static_cast<void>(!write(2, reason, strlen(reason)));
  abort();
}

float widen(uint16_t bits) {
  const float x = std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  return std::abs(x) < 0x1p-126f ? 0.0f : x;  // denormals are zeros
}

void product(Tile& c, const Tile& a, const Tile& b) {
  if (a.rows != c.rows || b.column_bytes != c.column_bytes || a.column_bytes != 4 * b.rows)
    fail("tdpbf16ps: the tiles' shapes do not fit\n");
  for (int m = 0; m < c.rows; m++) {
    float sums[16][2] = {};
    for (int k = 0; k < a.column_bytes / 4; k++) {
      for (int n = 0; n < b.column_bytes / 4; n++) {
        for (int i = 0; i < 2; i++) {
          uint16_t x, y;
          memcpy(&x, &a.data[m][4 * k + 2 * i], 2);
          memcpy(&y, &b.data[k][4 * n + 2 * i], 2);
          sums[n][i] = __builtin_fmaf(widen(x), widen(y), sums[n][i]);
        }
      }
    }
    for (int n = 0; n < b.column_bytes / 4; n++) {
      float value;
      memcpy(&value, &c.data[m][4 * n], 4);
      value += sums[n][0] + sums[n][1];
      memcpy(&c.data[m][4 * n], &value, 4);
    }
  }
}

void configure(const unsigned char* from) {
  if (from[0] != 1) fail("ldtilecfg: the palette is not 1\n");
  for (int i = 0; i < 8; i++) {
    uint16_t column_bytes;
    memcpy(&column_bytes, from + 16 + 2 * i, 2);
    const int rows = from[48 + i];
    if (column_bytes > 64 || rows > 16 || (rows == 0) != (column_bytes == 0))
      fail("ldtilecfg: not a shape of a tile\n");
    tiles[i] = Tile{};
    tiles[i].rows = rows;
    tiles[i].column_bytes = column_bytes;
  }
}

Tile& configured(int i) {
  if (i > 7 || tiles[i].rows == 0) fail("a tile that is not configured\n");
  return tiles[i];
}

// The instruction at `code`: its length, or 0 if it is none of AMX.
int execute(const unsigned char* code, const greg_t* registers) {
  static constexpr int kRegisters[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                       REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                       REG_R12, REG_R13, REG_R14, REG_R15};
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2) return 0;  // three-byte VEX, 0F38
  const bool extend_index = !(code[1] & 0x40), extend_base = !(code[1] & 0x20);
  const int vvvv = ~code[2] >> 3 & 15, prefix = code[2] & 3;
  if (code[2] & 0x84) return 0;  // W0, 128 bits
  const int opcode = code[3], mod = code[4] >> 6, reg = code[4] >> 3 & 7, rm = code[4] & 7;
  enum { kNone, k66, kF3, kF2 };

  if (opcode == 0x5c && prefix == kF3 && mod == 3) {
    product(configured(reg), configured(rm), configured(vvvv));
    return 5;
  }
  if (opcode == 0x49 && mod == 3) {
    if (prefix == kF2) {
      memset(configured(reg).data, 0, sizeof(Tile::data));
      return 5;
    }
    if (prefix != kNone || code[4] != 0xc0) return 0;
    for (Tile& tile : tiles) tile = Tile{};
    return 5;
  }
  // the others have a memory operand
  if (mod == 3) return 0;
  auto value = [&](int number) { return static_cast<int64_t>(registers[kRegisters[number]]); };
  int64_t address = 0, index = 0;
  int length = 5;
  if (rm == 4) {
    const int sib = code[length++], base = (sib & 7) + 8 * extend_base;
    const int index_number = (sib >> 3 & 7) + 8 * extend_index;
    if ((sib & 7) == 5 && mod == 0) return 0;
    address = value(base);
    if (index_number != 4) index = value(index_number) << (sib >> 6);
  } else if (rm == 5 && mod == 0) {
    int32_t displacement;
    memcpy(&displacement, code + length, 4);
    address = reinterpret_cast<int64_t>(code + length + 4) + displacement;
    length += 4;
  } else {
    address = value(rm + 8 * extend_base);
  }
  if (mod == 1) address += static_cast<signed char>(code[length++]);
  if (mod == 2) {
    int32_t displacement;
    memcpy(&displacement, code + length, 4);
    address += displacement;
    length += 4;
  }
  if (opcode == 0x49 && prefix == kNone) {
    configure(reinterpret_cast<const unsigned char*>(address + index));
    return length;
  }
  if (opcode != 0x4b || rm != 4) return 0;
  Tile& tile = configured(reg);
  for (int row = 0; row < tile.rows; row++) {
    auto* memory = reinterpret_cast<unsigned char*>(address + row * index);
    if (prefix == kF2)
      memcpy(tile.data[row], memory, tile.column_bytes);
    else
      memcpy(memory, tile.data[row], tile.column_bytes);
  }
  return length;
}

void handle(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const int length = execute(reinterpret_cast<const unsigned char*>(registers[REG_RIP]), registers);
  if (!length) fail("not an instruction this emulates\n");
  registers[REG_RIP] += length;
}

}  // namespace

extern "C" void start_emulating_amx() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}
