// Memory traffic per instruction of the program and buffer.
//
// The n-th execution of an instruction by each lane of a simdgroup between two rendezvous is taken
// as one execution by all: a GPU would coalesce exactly those addresses. Sectors are 32 bytes, lines
// 128; threadgroup memory has 32 banks of 4 bytes (a common model, not a statement by Apple).
#pragma once
#include "state.h"

struct Wave {  // one execution by up to 32 lanes
  uint64_t address[32];
  uint32_t mask, size;
};
struct Batch {  // what one simdgroup executed since its last rendezvous
  uint32_t executions[32];
  Array<Wave> waves;
};
struct Site {
  EmuAccesses counts;
  Batch batches[MAX_SIMDGROUPS];
};
struct Traffic {
  Array<Site*> sites;
  Array<uint32_t> touched[MAX_SIMDGROUPS];
  uint32_t* table;  // open addressing: index into sites + 1
  uint32_t table_size;
};
static Traffic traffic;

static uint64_t site_hash(uint64_t pc, int32_t buffer) {
  return (pc * 32 + (uint64_t)(buffer + 1)) * 0x9E3779B97F4A7C15ull >> 32;
}
static void insert_site(uint32_t index) {
  const EmuAccesses& c = traffic.sites[index]->counts;
  uint64_t at = site_hash(c.pc, c.buffer);
  while (traffic.table[at % traffic.table_size]) at++;
  traffic.table[at % traffic.table_size] = index + 1;
}
static uint32_t find_site(uint64_t pc, int32_t buffer, AccessKind kind) {
  if (traffic.table_size)
    for (uint64_t at = site_hash(pc, buffer);; at++) {
      uint32_t entry = traffic.table[at % traffic.table_size];
      if (!entry) break;
      const EmuAccesses& c = traffic.sites[entry - 1]->counts;
      if (c.pc == pc && c.buffer == buffer && c.kind == kind) return entry - 1;
    }
  Site* site = (Site*)calloc(1, sizeof(Site));
  site->counts.pc = pc;
  site->counts.buffer = buffer;
  site->counts.kind = kind;
  traffic.sites.push(site);
  if (traffic.sites.size * 2 > traffic.table_size) {
    traffic.table_size = traffic.table_size ? traffic.table_size * 2 : 1024;
    free(traffic.table);
    traffic.table = (uint32_t*)calloc(traffic.table_size, sizeof(uint32_t));
    for (uint32_t i = 0; i < traffic.sites.size; i++) insert_site(i);
  } else {
    insert_site(traffic.sites.size - 1);
  }
  return traffic.sites.size - 1;
}

static void stamp_sectors(Region& region, uint64_t offset, uint64_t size, AccessKind kind) {
  uint32_t* stamp = kind == LOAD ? region.load_stamp : region.store_stamp;
  EmuBuffer& buffer = state.launch->buffers[region.buffer];
  for (uint64_t s = (region.base + offset) / 32 - region.base / 32;
       s <= (region.base + offset + size - 1) / 32 - region.base / 32; s++)
    if (stamp[s] != state.group + 1) {
      stamp[s] = state.group + 1;
      (kind == LOAD ? buffer.distinct_load_sectors : buffer.distinct_store_sectors)++;
    }
}
static void count_access(Region& region, uint64_t offset, uint64_t size, AccessKind kind, uint64_t pc) {
  const EmuThread& t = state.current->thread;
  uint32_t simdgroup = t.simdgroup_index_in_threadgroup, lane = t.thread_index_in_simdgroup;
  if (region.buffer >= 0) stamp_sectors(region, offset, size, kind);
  uint32_t index = find_site(pc, region.buffer, kind);
  Batch& batch = traffic.sites[index]->batches[simdgroup];
  uint32_t n = batch.executions[lane]++;
  if (n >= batch.waves.size) {
    if (batch.waves.size == 0) traffic.touched[simdgroup].push(index);
    batch.waves.resize_zeroed(n + 1);
  }
  Wave& wave = batch.waves[n];
  wave.address[lane] = region.base + offset;
  wave.mask |= 1u << lane;
  wave.size = (uint32_t)size;
}

// Sorts and removes repetitions; returns how many are left. At most a few hundred values.
static uint32_t distinct(uint64_t* values, uint32_t n) {
  for (uint32_t i = 1; i < n; i++) {
    uint64_t v = values[i];
    uint32_t j = i;
    for (; j && values[j - 1] > v; j--) values[j] = values[j - 1];
    values[j] = v;
  }
  uint32_t left = 0;
  for (uint32_t i = 0; i < n; i++)
    if (!left || values[left - 1] != values[i]) values[left++] = values[i];
  return left;
}
// The distinct aligned units of `unit` bytes that a wave touches.
static uint32_t units_of(const Wave& wave, uint64_t unit, uint64_t* units, uint32_t limit) {
  uint32_t n = 0;
  for (uint32_t lane = 0; lane < 32; lane++)
    if (wave.mask >> lane & 1)
      for (uint64_t u = wave.address[lane] / unit;
           u <= (wave.address[lane] + wave.size - 1) / unit && n < limit; u++)
        if (!n || units[n - 1] != u) units[n++] = u;
  return distinct(units, n);
}
static void count_device_wave(EmuAccesses& counts, const Wave& wave) {
  uint64_t sectors[256];
  uint32_t n = units_of(wave, 32, sectors, 256);
  counts.sectors += n;
  for (uint32_t i = 0; i < n; i++) counts.lines += i == 0 || sectors[i] / 4 != sectors[i - 1] / 4;
}
// Conflicts: rounds needed beyond those that the amount of data takes anyway.
static void count_bank_conflicts(EmuAccesses& counts, const Wave& wave) {
  uint64_t words[256];
  uint32_t n = units_of(wave, 4, words, 256), used[32] = {}, most = 0;
  for (uint32_t i = 0; i < n; i++)
    if (++used[words[i] % 32] > most) most = used[words[i] % 32];
  uint32_t needed = (n + 31) / 32;
  counts.conflicts += most > needed ? most - needed : 0;
}
// A rendezvous of the simdgroup: what its lanes executed so far becomes counts.
static void flush_simdgroup(uint32_t simdgroup) {
  for (uint32_t index : traffic.touched[simdgroup]) {
    Site& site = *traffic.sites[index];
    Batch& batch = site.batches[simdgroup];
    for (Wave& wave : batch.waves) {
      uint32_t lanes = (uint32_t)__builtin_popcount(wave.mask);
      site.counts.instructions++;
      site.counts.lanes += lanes;
      site.counts.bytes += (uint64_t)lanes * wave.size;
      if (site.counts.buffer >= 0) count_device_wave(site.counts, wave);
      else count_bank_conflicts(site.counts, wave);
    }
    batch.waves.size = 0;
    memset(batch.executions, 0, sizeof batch.executions);
  }
  traffic.touched[simdgroup].size = 0;
}
static void release_traffic() {
  for (Site* site : traffic.sites) {
    for (Batch& batch : site->batches) batch.waves.release();
    free(site);
  }
  traffic.sites.release();
  for (auto& touched : traffic.touched) touched.release();
  free(traffic.table);
  traffic.table = nullptr;
  traffic.table_size = 0;
}
