#include "cpu/run/plan.h"

#include <bit>
#include <utility>

namespace fastcl::cpu {

namespace {

constexpr int64_t kBlock = 256;
constexpr int64_t kMinTasks = 6;  // at a time, where a block has kMinBlock rows at least
constexpr int64_t kMinBlock = 64;
constexpr int64_t kPart = 1536;  // keys at most, unless tasks are many; a part's own sums then cost little
constexpr int64_t kMaxTasks = 32;
constexpr int64_t kMaxGroups = 64;  // of a side; half as many tasks of a symmetric problem run at a time
constexpr int64_t kMaxCopies = 16;  // each is zeroed, filled and added up
constexpr int64_t kCopyBlocks = 4;  // of the other side, at least, for each copy

// A block keeps a tile's operands in the second-level cache; blocks are smaller where few would leave threads
// idle, and all about equal, since tasks wait for each other.
int64_t block_for(int64_t longest, bool symmetric) {
  const int64_t blocks = symmetric ? 2 * kMinTasks : kMinTasks;
  return even_block(longest, std::clamp(ceil_div(longest, blocks), kMinBlock, kBlock));
}

Groups make_groups(int64_t count, int64_t block) {
  Groups side;
  side.count = count;
  side.block = block;
  side.blocks = ceil_div(count, block);
  const int64_t blocks_each = std::max<int64_t>(ceil_div(side.blocks, kMaxGroups), 1);
  side.groups = ceil_div(side.blocks, blocks_each);
  return side;
}

// Every pair of groups, and each group with itself, as in a tournament: no group twice in a round.
std::vector<std::pair<int64_t, int64_t>> tournament(int64_t groups) {
  std::vector<std::pair<int64_t, int64_t>> pairs;
  for (int64_t g = 0; g < groups; g++) pairs.emplace_back(g, g);
  const int64_t players = round_up(groups, 2), ring = players - 1;  // with a bye where the number is odd
  for (int64_t round = 0; round < ring; round++) {
    for (int64_t k = 0; k < players / 2; k++) {
      const int64_t a = k == 0 ? ring : (round + k) % ring, b = (round - k + ring) % ring;
      if (std::max(a, b) < groups) pairs.emplace_back(std::min(a, b), std::max(a, b));
    }
  }
  return pairs;
}

// Every group of the long side with every one of the short, all of the long side in a round.
std::vector<std::pair<int64_t, int64_t>> rounds(const Groups& long_side, const Groups& short_side) {
  std::vector<std::pair<int64_t, int64_t>> pairs;
  for (int64_t round = 0; round < short_side.groups; round++)
    for (int64_t g = 0; g < long_side.groups; g++)
      pairs.emplace_back(g, (g / short_side.copies + round) % short_side.groups);
  return pairs;
}

}  // namespace

int64_t parts_of_keys(int64_t queries, int64_t keys) {
  const int64_t blocks = std::max<int64_t>(ceil_div(queries, kMaxBlock), 1);
  const auto parts = std::bit_ceil(static_cast<uint64_t>(ceil_div(keys, kPart)));  // as many for each thread
  return std::min(static_cast<int64_t>(parts), std::max<int64_t>(kMaxTasks / blocks, 1));
}

Plan make_plan(int64_t queries, int64_t keys, bool symmetric) {
  const int64_t block = block_for(std::max(queries, keys), symmetric);
  Plan plan{make_groups(queries, block), make_groups(keys, block), symmetric, {}};
  const bool by_query = queries >= keys;
  Groups &long_side = by_query ? plan.query : plan.key, &short_side = by_query ? plan.key : plan.query;
  std::vector<std::pair<int64_t, int64_t>> pairs;
  if (symmetric) {
    pairs = tournament(plan.query.groups);
  } else if (short_side.groups) {
    short_side.copies = std::clamp<int64_t>(
        std::min(long_side.groups / short_side.groups, long_side.blocks / kCopyBlocks), 1, kMaxCopies);
    pairs = rounds(long_side, short_side);
    if (!by_query)
      for (auto& [query, key] : pairs) std::swap(query, key);
  }
  std::vector<int64_t> query_turns(plan.query.groups * plan.query.copies),
      own_key_turns(plan.key.groups * plan.key.copies);
  std::vector<int64_t>& key_turns = symmetric ? query_turns : own_key_turns;
  for (const auto& [query, key] : pairs) {
    Plan::Task task{query, key, key % plan.query.copies,  query % plan.key.copies,
                    0,     0,   symmetric && query == key};
    int64_t& query_turn = query_turns[query * plan.query.copies + task.query_copy];
    int64_t& key_turn = key_turns[key * plan.key.copies + task.key_copy];
    task.query_turn = query_turn++;
    task.key_turn = task.on_diagonal ? task.query_turn : key_turn++;
    plan.tasks.push_back(task);
  }
  return plan;
}

}  // namespace fastcl::cpu
