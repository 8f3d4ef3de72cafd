// Profiles: what is read, and what every wrong text gets.
#include <gtest/gtest.h>

#include "controller/planner/library.h"
#include "tests/unit/planner_models.h"

namespace everstep::planner {
namespace {

constexpr char kText[] =
    "everstep-profile 1\n"
    "# a comment\n"
    "model = toy\n"
    "microbatch = 4\n"
    "devices-per-node = 2\n"
    "device-memory-mib = 16384\n"
    "between-gb-s = 12.5\n"
    "\n"
    "layer,forward_ms,backward_ms,activation_mib,parameters,output_mib\n"
    "0,0.752,1.5,8.984,1000,3.125\n"
    " 1 , 6.51, 13.448 ,268.969,30740800,3.125\r\n";

TEST(Profile, ReadsWhatItDocuments) {
  const Answer<Profile> read = ParseProfile(kText);
  ASSERT_TRUE(read.ok()) << read.refusal().what;
  const Profile& p = read.value();
  EXPECT_EQ(p.model, "toy");
  EXPECT_EQ(p.microbatch, 4u);
  EXPECT_EQ(p.devices_per_node, 2u);
  EXPECT_EQ(p.device_memory_bytes, std::int64_t{16} << 30);
  EXPECT_EQ(p.between.bytes_per_s, 12'500'000'000);
  EXPECT_EQ(p.between.latency_ns, 20'000) << "what is not said has its default";
  ASSERT_EQ(p.layers.size(), 2u);
  EXPECT_EQ(p.layers[0].forward_ns, 752'000);
  EXPECT_EQ(p.layers[1].backward_ns, 13'448'000);
  EXPECT_EQ(p.layers[1].parameters, 30740800);
  EXPECT_EQ(p.layers[1].output_bytes, 3'276'800);
  EXPECT_EQ(p.layers[1].optimizer_ns, 0);
}

TEST(Profile, IsWrittenAsItIsRead) {
  Random random(3);
  for (int i = 0; i < 200; ++i) {
    Profile p = models::Draw(&random, {.layers = 5, .uneven_links = true, .tight_memory = true});
    p.layers[0].forward_ns = random.Between(1, 900'000'000'000);
    p.layers[0].activation_bytes = random.Between(0, std::int64_t{1} << 37);
    p.inside.bytes_per_s = random.Between(1, 900'000'000'000);
    const Answer<Profile> again = ParseProfile(ProfileText(p));
    ASSERT_TRUE(again.ok()) << again.refusal().what;
    EXPECT_EQ(again.value(), p) << ProfileText(p);
    EXPECT_EQ(Fingerprint(again.value()), Fingerprint(p));
    ++p.layers.back().backward_ns;
    EXPECT_NE(Fingerprint(again.value()), Fingerprint(p));
  }
}

std::string Refused(const std::string& text) {
  const Answer<Profile> read = ParseProfile(text);
  return read.ok() ? "(read)" : read.refusal().what + " | " + read.refusal().change;
}

std::string With(std::string_view from, std::string_view to) {
  std::string text = kText;
  text.replace(text.find(from), from.size(), to);
  return text;
}

TEST(Profile, RefusesWithTheLineTheValueAndTheLimit) {
  EXPECT_EQ(Refused(With("profile 1", "profile 2")),
            "line 1: a profile of version \"2\" | this program reads version 1");
  EXPECT_EQ(Refused(With("6.51", "-6.51")),
            "line 11: forward_ms is \"-6.51\" | a number from 0 to 1000000");
  EXPECT_EQ(Refused(With("6.51", "nan")), "line 11: forward_ms cannot be \"nan\" | a plain number");
  EXPECT_EQ(Refused(With("6.51", "1e300")),
            "line 11: forward_ms is \"1e300\" | a number from 0 to 1000000");
  EXPECT_EQ(Refused(With("6.51", "6.5x")),
            "line 11: forward_ms cannot be \"6.5x\" | a plain number");
  EXPECT_EQ(Refused(With("6.51", "")), "line 11: forward_ms is missing | ");
  EXPECT_EQ(Refused(With(",30740800", "")), "line 11: 5 values for 6 columns | ");
  EXPECT_EQ(Refused(With("30740800", "0.5")), "line 11: parameters is \"0.5\" | a whole number");
  EXPECT_EQ(Refused(With("0.752,1.5", "0,0")),
            "line 10: layer 0 takes no time | forward_ms + backward_ms of at least 0.000001; join "
            "it with a neighbour");
  EXPECT_EQ(Refused(With(" 1 ", "2")),
            "line 11: layer 2 where layer 1 was expected | layers in order from 0, each once");
  EXPECT_EQ(Refused(With("forward_ms", "froward_ms")),
            "line 9: \"froward_ms\" is no column | columns: layer, forward_ms, backward_ms, "
            "optimizer_ms, activation_mib, output_mib, parameters");
  EXPECT_EQ(Refused(With("activation_mib", "forward_ms")),
            "line 9: \"forward_ms\" twice | columns: layer, forward_ms, backward_ms, "
            "optimizer_ms, activation_mib, output_mib, parameters");
  EXPECT_EQ(Refused(With(",backward_ms", ",output_mib")).substr(0, 40),
            "line 9: \"output_mib\" twice | columns: la");
  EXPECT_EQ(Refused(With("microbatch = 4", "microbatch = 0")),
            "line 4: microbatch is \"0\" | a number from 1 to 1048576");
  EXPECT_EQ(Refused(With("microbatch", "micro-batch")).substr(0, 44),
            "line 4: no setting is called \"micro-batch\" |");
  EXPECT_EQ(Refused(With("microbatch = 4", "model = x")), "line 4: \"model\" twice | ");
  EXPECT_EQ(Refused(With("= toy", "= a b")),
            "line 3: model cannot be \"a b\" | 1 to 200 printable characters without blanks");
  EXPECT_EQ(Refused(""),
            "the profile has no table of layers | a header with layer, forward_ms, backward_ms, "
            "optimizer_ms, activation_mib, output_mib, parameters and a line for each layer");
  EXPECT_EQ(Refused("layer,forward_ms,backward_ms,parameters\n"),
            "the profile has no layers | at least one");
  EXPECT_EQ(Refused("layer,forward_ms,parameters\n"),
            "line 1: the table has no column backward_ms | columns: layer, forward_ms, "
            "backward_ms, optimizer_ms, activation_mib, output_mib, parameters");
  EXPECT_EQ(Refused(std::string(kMaxProfileBytes + 1, '#')),
            "a profile of 4194305 bytes | at most 4194304 bytes are read");
  EXPECT_EQ(Refused(With("6.51", "999999")),
            "a microbatch takes 1000014 ms in all layers together | at most 1000000 ms; a smaller "
            "microbatch");
  std::string many = "layer,forward_ms,backward_ms,parameters\n";
  for (int i = 0; i < 4097; ++i) many += std::to_string(i % 4096) + ",1,1,1\n";
  EXPECT_EQ(Refused(many),
            "line 4098: layer 0 where layer 4096 was expected | layers in order "
            "from 0, each once");
}

TEST(Profile, OfAnotherModelIsRefused) {
  const Profile p = ParseProfile(kText).value();
  Profile other = p;
  EXPECT_TRUE(CheckSameModel(p, other).ok());
  other.layers[1].forward_ns *= 2;
  EXPECT_TRUE(CheckSameModel(p, other).ok()) << "measured anew";
  other.layers[1].parameters = 7;
  EXPECT_EQ(CheckSameModel(p, other).refusal().what,
            "layer 1 has 7 parameters in the profile, 30740800 in the model");
  other.layers.pop_back();
  EXPECT_EQ(CheckSameModel(p, other).refusal().what, "the profile has 1 layers, the model 2");
  other.model = "gpt";
  EXPECT_EQ(CheckSameModel(p, other).refusal().what, "the profile is of model gpt, not of toy");
}

TEST(Profile, RealProfilesAreReadAndHaveTemplatesFrom16NodesDownToTheirFewest) {
  const auto files = models::RealProfiles();
  if (files.empty()) GTEST_SKIP() << "no measured profiles: set EVERSTEP_TRACES";
  EXPECT_EQ(files.size(), 9u);
  for (const auto& file : files) {
    const Answer<Profile> read = ParseProfile(models::ReadText(file));
    ASSERT_TRUE(read.ok()) << file << ": " << read.refusal().what;
    Profile p = read.value();
    EXPECT_GE(p.layers.size(), 26u) << file;
    p.device_memory_bytes = std::int64_t{32} << 30;
    const Answer<Library> library = MakeLibrary(p, {.nodes = 16, .faults = 0});
    ASSERT_TRUE(library.ok()) << file << ": " << library.refusal().what;
    for (const Template& t : library.value().templates) {
      for (const Stage& stage : t.stages) {
        EXPECT_LE(stage.bytes, p.device_memory_bytes) << file << " nodes " << t.nodes;
      }
    }
    EXPECT_EQ(library.value().sizes.back(), 16u) << file;
  }
}

TEST(Profile, WhatHoldsNoModelNamesTheNumberAndWhatWouldWork) {
  Random random(5);
  Profile p = models::Draw(&random, {.layers = 8, .equal = true});
  for (Layer& l : p.layers) {
    l.parameters = 1 << 26;  // 1 GiB resident
    l.activation_bytes = std::int64_t{1} << 28;
  }
  const auto refused = [&](std::uint32_t nodes, std::uint32_t faults) {
    const Answer<Library> made = MakeLibrary(p, {.nodes = nodes, .faults = faults});
    return made.ok() ? "(made)" : made.refusal().what + " | " + made.refusal().change;
  };
  p.device_memory_bytes = std::int64_t{1} << 30;
  EXPECT_EQ(refused(8, 1),
            "layer 0 needs 1.25 GiB on a device, which has 1.00 GiB | a smaller microbatch, that "
            "layer divided, or larger devices");
  p.device_memory_bytes = std::int64_t{6} << 30;
  EXPECT_EQ(refused(1, 0),
            "1 nodes cannot hold the model, whose smallest pipeline has 2 | 2 nodes for 1 copy");
  EXPECT_EQ(refused(4, 2),
            "3 copies of a pipeline of 2 nodes need 6 nodes; there are 4 | 6 nodes, "
            "or faults of 1");
  EXPECT_EQ(refused(8, 1), "(made)");
  // Deep pipelines hold more activations: those of 5 stages and more do not fit.
  p.layers.resize(5);
  for (Layer& l : p.layers) l.activation_bytes = std::int64_t{5} << 28;
  EXPECT_EQ(refused(5, 0),
            "5 nodes are no sum of 1 or more of the template sizes, which are 4 | "
            "devices of 7.25 GiB, with which a pipeline of 5 nodes fits");
  p.microbatch = 3;
  p.devices_per_node = 2;
  EXPECT_EQ(refused(0, 0), "0 nodes | 1 to 4096");
  EXPECT_EQ(refused(9, 65), "65 faults | 0 to 64");
  p.devices_per_node = 6;
  p.microbatch = 5;
  EXPECT_EQ(refused(8, 0),
            "a microbatch of 5 does not divide among the 6 devices of a node | a number of devices "
            "that has a power of two of stages each node, and a microbatch that the devices of a "
            "stage divide");
}

}  // namespace
}  // namespace everstep::planner
