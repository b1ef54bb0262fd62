// The tile registers as every AMX kernel sets them: palette 1, all eight of them 16 rows of 64 bytes.
#pragma once
#include "vec.h"

namespace ihvp {
namespace IHVP_ISA {
namespace {

struct __attribute__((packed)) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Not a local: gcc's header tells the compiler of its first eight bytes only, and the rest could stay unwritten.
constexpr TileConfig tile_config;

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp
