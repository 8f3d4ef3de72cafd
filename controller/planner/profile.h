// What the planner knows of a model and of the machines: a measured time and size for each layer,
// and the links between devices. Read from a text that people and scripts can write.
//
//   everstep-profile 1             a comment line begins with '#'
//   model = gpt-1.5b               which model this was measured on
//   microbatch = 4                 samples of one microbatch
//   devices-per-node = 8
//   device-memory-mib = 16384      0: not limited
//   inside-latency-us = 5          between devices of one node, and from there
//   inside-gb-s = 100              10^9 bytes a second; 0: transfers cost their latency alone
//   between-latency-us = 20        between nodes
//   between-gb-s = 12.5
//   weight-bytes = 2               for each parameter; likewise gradient-bytes, optimizer-bytes
//   layer,forward_ms,backward_ms,optimizer_ms,activation_mib,output_mib,parameters
//   0,0.752,0.798,5.655,8.984,3.125,82124800
//   ...
//
// The header names the columns, in any order: `layer` counts from 0; forward_ms, backward_ms and
// parameters must be there. activation_mib is what a stage keeps of one microbatch between its
// forward and its backward pass, output_mib what it sends to the next layer. Without the first line
// the text is a table alone and everything above it has its default.
//
// Times are whole nanoseconds and sizes whole bytes, so sums and ties are exact on every machine.
// Pure.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "controller/planner/answer.h"

namespace everstep::planner {

inline constexpr std::size_t kMaxProfileBytes = std::size_t{4} << 20;
inline constexpr std::uint32_t kMaxLayers = 4096;
inline constexpr std::uint32_t kMaxDevices = 64;  // of a node
// With these no sum or product of the planner overflows, however many microbatches there are.
inline constexpr double kMaxLayerMs = 1e6;  // of one layer, and of all of them together
inline constexpr std::int64_t kMaxLayerBytes = std::int64_t{1} << 38;
inline constexpr std::int64_t kMaxLayerParameters = std::int64_t{1} << 36;

struct Layer {
  std::int64_t forward_ns = 0;  // of one microbatch on one device
  std::int64_t backward_ns = 0;
  std::int64_t optimizer_ns = 0;      // once an iteration
  std::int64_t parameters = 0;        // count
  std::int64_t activation_bytes = 0;  // kept from forward to backward, one microbatch
  std::int64_t output_bytes = 0;      // sent to the next layer, one microbatch
  friend bool operator==(const Layer&, const Layer&) = default;
};

struct Link {
  std::int64_t latency_ns = 0;
  std::int64_t bytes_per_s = 0;  // 0: as fast as can be
  friend bool operator==(const Link&, const Link&) = default;
};

struct Profile {
  std::string model;  // empty: not said
  std::uint32_t microbatch = 1;
  std::uint32_t devices_per_node = 1;
  std::int64_t device_memory_bytes = 0;  // 0: not limited
  Link inside{.latency_ns = 5'000, .bytes_per_s = 100'000'000'000};
  Link between{.latency_ns = 20'000, .bytes_per_s = 1'250'000'000};
  // Bytes of one parameter: mixed precision with Adam. Gradients are not moved to another node.
  std::uint32_t weight_bytes = 2, gradient_bytes = 2, optimizer_bytes = 12;
  std::vector<Layer> layers;
  friend bool operator==(const Profile&, const Profile&) = default;

  // What a device holds of a layer whatever it computes.
  std::int64_t ResidentBytes(const Layer& layer) const {
    return layer.parameters * (weight_bytes + gradient_bytes + optimizer_bytes);
  }
  // What moves when another node takes a layer over.
  std::int64_t StateBytes(const Layer& layer) const {
    return layer.parameters * (weight_bytes + optimizer_bytes);
  }
  std::int64_t GradientBytes(const Layer& layer) const { return layer.parameters * gradient_bytes; }
};

// A refusal names the line, the value and the limit.
Answer<Profile> ParseProfile(std::string_view text);

// The text that ParseProfile reads as this profile.
std::string ProfileText(const Profile& profile);

// Where the numbers themselves make no plan: no layers, a microbatch or devices of 0, ... A parsed
// profile passes. For callers that build one or change a field.
Answer<Profile> CheckProfile(Profile profile);

// Whether `other` was measured on the same model (same name where both have one, same layers with
// the same parameters): what a profile that replaces another must be. The refusal names the first
// difference.
Answer<Profile> CheckSameModel(const Profile& profile, Profile other);

// FNV-1a of ProfileText: the same text, the same templates.
std::uint64_t Fingerprint(const Profile& profile);

// Nanoseconds that `bytes` take over the link.
std::int64_t TransferNs(const Link& link, std::int64_t bytes);

}  // namespace everstep::planner
