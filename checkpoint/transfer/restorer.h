// Brings one rank's restore source into its arena: from another arena on this node, else from a
// peer.
#pragma once

#include <atomic>

#include "checkpoint/transfer/job_table.h"
#include "checkpoint/transfer/local_rank.h"
#include "checkpoint/transfer/relay.h"
#include "checkpoint/transfer/transfer_service.h"

namespace everstep::checkpoint {

// The slot of `arena` that holds what `restore` asks for; not verified.
std::optional<SlotView> FindRestore(const Arena& arena, const RestorePart& restore);

// Blocks until the bytes are in the rank's arena, verified (the slot's view), or cannot be had.
// `own_port`: this node's data plane, dialled only for what another rank here takes. What comes
// from a peer is in `relays` while it comes. `memory`: becomes the arena that it wrote through; to
// unmap it takes a while, so the caller closes it when the bytes have been told of.
Result<SlotView> BringRestore(const TransferOptions& options, ArenaHost* host,
                              const JobFacts& facts, const LocalRank& local, std::uint16_t own_port,
                              RelayTable* relays, Arena* memory);

}  // namespace everstep::checkpoint
