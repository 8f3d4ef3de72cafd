/* libeverstep.so: how a trainer process keeps its state in its node's memory. C ABI, version 1.
 *
 * Conventions:
 *  1. Handles are opaque; who opens closes.
 *  2. Functions answer an int: 0 (EVERSTEP_OK), a positive outcome, or a negative error. After an
 * error everstep_last_error gives one sentence: who, what, the limit, what to do next.
 *  3. Structs begin with their size in bytes, set by the caller; a newer library fills no more than
 * that.
 *  4. Buffers are the caller's. Pointers that the library gives stay valid until the next call on
 * the same handle that says otherwise.
 *  5. One thread at a time per handle, except that everstep_capture_wait and _watch may be called
 * beside everything but everstep_close. A handle does not work in a forked child (EVERSTEP_EINVAL).
 *  6. Nothing is thrown across, nothing is printed, no signal is handled. One thread is started, by
 * the first everstep_capture_start of a handle, all signals blocked; everstep_close ends it. Checks
 * of a large slot use some more, which end before the call does.
 *  7. Within one ABI version functions and trailing struct fields are only added.
 *
 * A capture: begin, write ..., commit (or, with bytes that a device brings: begin, place, write,
 * commit). Or, overlapped with the next step's computation: begin,
 * start, and, before the late bytes change, wait and publish. From begin to commit or publish the
 * slot is torn; whoever dies in between leaves the other slot, which is whole. Both give the same
 * bytes. docs/internals/arena.md has the bytes.
 */
#ifndef EVERSTEP_EVERSTEP_H_
#define EVERSTEP_EVERSTEP_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EVERSTEP_ABI_VERSION 1u

/* Outcomes. */
#define EVERSTEP_OK 0
#define EVERSTEP_SKIPPED 1 /* capture_begin: nothing may be overwritten now; see everstep_stats */
#define EVERSTEP_NONE 2    /* restore, find: there is no such step; start from nothing */

/* Errors. */
#define EVERSTEP_EINVAL (-1)       /* an argument or the order of calls makes no sense */
#define EVERSTEP_ENOMEM (-2)       /* the machine has not got the memory for the arena */
#define EVERSTEP_ECORRUPT (-3)     /* a checksum disagrees */
#define EVERSTEP_ESTALE (-4)       /* this process belongs to a generation that is over */
#define EVERSTEP_EUNAVAILABLE (-5) /* no agent answers */
#define EVERSTEP_ETIMEDOUT (-6)
#define EVERSTEP_EREFUSED (-7)  /* the agent said no, or could not get the bytes */
#define EVERSTEP_EINTERNAL (-8) /* the operating system refused; the text has its reason */

/* Flags of a capture. */
#define EVERSTEP_REPLICATED_LAYOUT 1u /* every rank's state is the same (data parallel) */
#define EVERSTEP_SHARE 8u             /* ... and this is one rank's share of it */
/* Flag of a request: for this process alone, which captures its own share next. */
#define EVERSTEP_ASSEMBLED 16u

typedef struct everstep_client everstep_client;

typedef struct everstep_options {
  uint32_t size; /* sizeof(everstep_options) */
  int32_t rank;
  int32_t world_size;
  uint32_t connect_timeout_ms; /* 0: 5000 */
  uint32_t commit_wait_ms; /* longest wait for a commit in capture_begin; 0: 2000. Halved after each
                              wait in vain, full again after a commit. */
  uint32_t reserved;
  uint64_t generation; /* EVERSTEP_GENERATION */
  const char* job;     /* EVERSTEP_JOB */
  const char* keeper;  /* EVERSTEP_KEEPER: path of the keeper's socket */
} everstep_options;

typedef struct everstep_slot {
  uint32_t size; /* sizeof(everstep_slot) */
  uint32_t slot;
  uint64_t sequence;
  int64_t step;
  uint64_t generation; /* that captured it */
  int32_t rank;        /* that captured it; another than one's own with a replicated layout */
  int32_t world_size;
  uint32_t flags;
  uint32_t crc_root;
  uint64_t payload_bytes; /* tensors, then the table */
  uint64_t table_offset;
  uint64_t table_bytes;
} everstep_slot;

typedef struct everstep_piece {
  const void* data;
  uint64_t bytes;
} everstep_piece;

/* Where some bytes of a slot's payload are to go. */
typedef struct everstep_target {
  uint64_t offset;
  uint64_t bytes;
  void* to;
} everstep_target;
/* `count` runs of `bytes` each, the strides apart, from the payload of the shard of `rank` into the
 * one that is asked for. */
typedef struct everstep_range {
  int32_t rank;
  uint32_t count;
  uint64_t source;
  uint64_t source_stride;
  uint64_t dest;
  uint64_t dest_stride;
  uint64_t bytes;
} everstep_range;

typedef struct everstep_stats {
  uint32_t size; /* sizeof(everstep_stats) */
  uint32_t agent_alive;
  uint64_t captured;
  uint64_t skipped;
  uint64_t replaced;      /* a captured, never committed step gave way to a newer one */
  uint64_t waited_ns;     /* for commits */
  uint64_t copy_ns;       /* between begin and commit */
  int64_t newest_step;    /* whole in this arena; -1: none */
  int64_t committed_step; /* newest that the agent reported; -1: none */
  char last_skip[32];     /* why: "uncommitted", "peer_slow", "no_controller", ... */
} everstep_stats;

/* EVERSTEP_ABI_VERSION of the library; refuse another than the one compiled against. */
uint32_t everstep_abi_version(void);
/* "0.1.0" */
const char* everstep_version(void);

/* Attaches to this rank's arena at the node's keeper. On error *out is a handle that only serves
 * everstep_last_error and everstep_close, or NULL without memory. */
int everstep_open(const everstep_options* options, everstep_client** out);
void everstep_close(everstep_client* client);
/* Of the newest call that failed. Valid until the next call on the handle. Never NULL. */
const char* everstep_last_error(const everstep_client* client);

/* Takes the memory for two slots of payload_bytes each, now. A slot with content that is too small
 * grows when it is next overwritten. Without it the first capture does so. */
int everstep_reserve(everstep_client* client, uint64_t payload_bytes);

/* Waits until the agent has put into the arena what this generation starts from, and checks every
 * byte. EVERSTEP_OK: *slot is what to load. EVERSTEP_NONE: start from nothing. It waits timeout_ms,
 * and 10 s more for each GB that the agent says is on its way. */
int everstep_restore(everstep_client* client, uint32_t timeout_ms, everstep_slot* slot);
/* As everstep_restore, but of the bytes only the table's are checked; everstep_load checks all. */
int everstep_restore_table(everstep_client* client, uint32_t timeout_ms, everstep_slot* slot);
/* Checks every byte of the slot and copies the targets, in one pass over memory, by several
 * threads. They must be in ascending order of offset and apart from each other. On an error (the
 * slot is damaged, or was overwritten) what the targets hold is undefined. */
int everstep_load(everstep_client* client, const everstep_slot* slot,
                  const everstep_target* targets, uint32_t count);
/* Before everstep_restore, for who can put a state together from the shards of a world of another
 * size. EVERSTEP_OK: *slot is a catalog of them (docs/internals/arena.md); read it by
 * everstep_payload, answer by everstep_request, and call this again. EVERSTEP_NONE: nothing of that
 * kind is asked, or bytes are still on their way after timeout_ms: call everstep_restore. Without
 * the answer everstep_restore is refused. */
int everstep_catalog(everstep_client* client, uint32_t timeout_ms, everstep_slot* slot);
/* Says which ranges of the shards make up this rank's state: data_bytes (a multiple of 64), then
 * the table. Bytes that no range names become zero; none may be named twice. Writes over the
 * catalog. flags: of the slot that comes of it: EVERSTEP_REPLICATED_LAYOUT, or EVERSTEP_ASSEMBLED
 * for one that is this process's alone, neither copied nor committed. What the agent finds wrong
 * with it, everstep_restore says. */
int everstep_request(everstep_client* client, const everstep_slot* catalog,
                     const everstep_range* ranges, uint32_t count, uint64_t data_bytes,
                     uint32_t flags, const void* table, uint64_t table_bytes);
/* The newest whole and checked slot at or under max_step, whatever generation captured it. */
int everstep_find(everstep_client* client, int64_t max_step, everstep_slot* slot);
/* Address of a slot's payload, payload_bytes long, read-only by contract. Valid until the next
 * capture_begin or reserve. EVERSTEP_ESTALE: overwritten since. */
int everstep_payload(everstep_client* client, const everstep_slot* slot, const void** data);

/* As memcpy, with stores that bypass the cache: for bytes that are loaded once and used later. Any
 * thread, no handle. */
void everstep_copy(void* to, const void* from, uint64_t bytes);
/* CRC32C (Castagnoli) of `bytes` of data that follow bytes whose CRC is `crc` (0: nothing before),
 * the checksum of every tier. Any thread, no handle. */
uint32_t everstep_crc32c(uint32_t crc, const void* data, uint64_t bytes);

/* Chooses the slot to overwrite and tears it. payload_bytes: at most what will be written, table
 * and padding included. May wait, bounded, for the commit of the step before. */
int everstep_capture_begin(everstep_client* client, int64_t step, uint64_t payload_bytes,
                           uint32_t flags);
/* Appends each piece at the next multiple of 64. offsets (may be NULL): where each came to lie. A
 * piece without data lies there already (everstep_capture_place): its checksum alone is taken. */
int everstep_capture_write(everstep_client* client, const everstep_piece* pieces, uint32_t count,
                           uint64_t* offsets);
/* For bytes that a device copies out by itself; the first call after begin. Lays the pieces out as
 * everstep_capture_write would, but counts none as written: copies those with data, sets what lies
 * between to zero, and leaves the others to the caller, who fills them at *to + offsets[i]. *to is
 * the slot's own memory, or with `image` that: memory of the caller's for as many bytes as begin
 * was told. When all is filled: one piece of all the bytes to everstep_capture_write or _start,
 * without data if they lie in the slot. */
int everstep_capture_place(everstep_client* client, const everstep_piece* pieces, uint32_t count,
                           void* image, uint64_t* offsets, void** to);
/* Where slot 0 or 1 lies in this process, its spare room too, for who tells a device of that
 * memory. EVERSTEP_NONE: it is not mapped, or capture_begin with these payload_bytes and flags may
 * put it elsewhere: the device must let go of it before. */
int everstep_capture_mapped(everstep_client* client, uint32_t slot, uint64_t payload_bytes,
                            uint32_t flags, void** data, uint64_t* bytes);
/* Appends the table, publishes the slot and rings the agent. */
int everstep_capture_commit(everstep_client* client, const void* table, uint64_t table_bytes);

/* In place of write and commit: the handle's thread appends the late pieces, then the early ones
 * and the table, each as everstep_capture_write would (late ones without data, too). Returns when
 * the early pieces and the table are copied aside; the memory of the late ones must stay as it is
 * until everstep_capture_wait has answered EVERSTEP_OK. offsets (may be NULL): of the late pieces,
 * then of the early ones. */
int everstep_capture_start(everstep_client* client, const everstep_piece* late, uint32_t late_count,
                           const everstep_piece* early, uint32_t early_count, const void* table,
                           uint64_t table_bytes, uint64_t* offsets);
/* EVERSTEP_OK: no bytes are being copied. EVERSTEP_ETIMEDOUT: they are. Sets no error text. */
int everstep_capture_wait(everstep_client* client, uint32_t timeout_ms);
/* For a thread that publishes what others started. EVERSTEP_OK: the number of copies that have
 * ended since the handle was opened is not *count any more, and now is; everstep_capture_abort
 * counts as an end, too. EVERSTEP_ETIMEDOUT: it still is. EVERSTEP_EINVAL: nothing was ever
 * started. */
int everstep_capture_watch(everstep_client* client, uint64_t* count, uint32_t timeout_ms);
/* Publishes the slot that everstep_capture_start filled, and rings the agent. Only for a caller who
 * knows that the late bytes did not change while they were copied; another calls abort. */
int everstep_capture_publish(everstep_client* client);

/* Gives the capture up, one under way too; the slot stays torn. */
void everstep_capture_abort(everstep_client* client);

/* Tells the agent about a step that was not captured. */
int everstep_report_step(everstep_client* client, int64_t step);

int everstep_get_stats(everstep_client* client, everstep_stats* stats);

#ifdef __cplusplus
}
#endif

#endif /* EVERSTEP_EVERSTEP_H_ */
