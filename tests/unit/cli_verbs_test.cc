// Transcripts of the command line: tests/unit/cli_golden/*.txt hold commands and what they print,
// against a small in-process controller with fixed replies. `cli_verbs_test --rewrite` writes them
// anew; read the diff.
//
//   $ everstep job show gpt      a command; stdout follows as it is
//   2> error: ...                a line on stderr
//   exit 3                       the exit code, when it is not 0
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include "admin.grpc.pb.h"
#include "checkpoint/files/file_tier.h"
#include "controller/cli/app.h"
#include "controller/cli/manual.h"
#include "controller/cli/registry.h"
#include "tests/unit/files_slot.h"

namespace everstep::cli {
namespace {

namespace fs = std::filesystem;

const std::string kSource = std::string(EVERSTEP_SOURCE_DIR) + "/";

bool Rewrite() {
  for (const std::string& arg : ::testing::internal::GetArgvs()) {
    if (arg == "--rewrite") return true;
  }
  return false;
}

v1::NodeStatus Node(const std::string& name, const std::string& state, const std::string& reason) {
  v1::NodeStatus node;
  node.set_node(name);
  node.set_state(state);
  node.set_address("127.0.0.1");
  node.set_incarnation(7);
  node.set_reason(reason);
  node.set_heartbeat_age_seconds(state == "LOST" ? 192 : 0.21);
  node.set_lease_ms(1500);
  node.set_warm(state == "ALIVE");
  node.set_since("2026-01-31T13:59:00.000Z");
  return node;
}

v1::NodeList Nodes() {
  v1::NodeList nodes;
  *nodes.add_items() = Node("n0", "ALIVE", "registered");
  *nodes.add_items() = Node("n1", "LOST", "node_lost");
  *nodes.add_items() = Node("n2", "ALIVE", "registered");
  nodes.mutable_items(0)->add_jobs("gpt:ranks 0-1");
  nodes.mutable_items(0)->set_agent_restarts(1);
  nodes.mutable_items(0)->set_slots(8);
  (*nodes.mutable_items(0)->mutable_labels())["zone"] = "b";
  nodes.mutable_items(1)->set_evidence("silent_ms=1510 lease_ms=1500");
  nodes.mutable_items(1)->set_drain_reason("node_drained: memory errors");
  nodes.mutable_items(1)->set_drain_since("2026-01-31T13:58:00.000Z");
  nodes.mutable_items(2)->add_jobs("gpt:ranks 2-3");
  return nodes;
}

v1::CheckpointPlacement Placement() {
  v1::CheckpointPlacement p;
  p.set_job("gpt-large");
  p.set_generation(3);
  p.set_copies(2);
  p.set_redundancy("replicate(2)");
  p.set_shape("group");
  p.set_host_sets(2);
  p.set_layout("sharded");
  p.set_committed_step(182441);
  p.set_why("2 host sets for 4 nodes, the fewest with equal load; copies cross every zone");
  p.add_fatal("rack=r1 (2 of 4 nodes)");
  for (int i = 0; i < 4; ++i) {
    v1::NodeCopies* n = p.add_nodes();
    n->set_node("n" + std::to_string(i));
    n->set_domain(i < 2 ? "zone=a rack=r1" : "");
    n->add_peers("n" + std::to_string((i + 2) % 4));
    for (int r = 0; r < 2; ++r) {
      n->add_ranks(2 * i + r);
      n->add_keeps(2 * ((i + 2) % 4) + 3 * r);
    }
    n->set_bytes(i == 3 ? 0 : 268435456ULL * 5 / 3);
  }
  const auto add = [](v1::Survival* s, const std::string& level, unsigned domains, unsigned lost,
                      double probability, double half) {
    s->set_level(level);
    s->set_domains(domains);
    s->set_lost(lost);
    s->set_probability(probability);
    s->set_low(probability - half);
    s->set_high(probability + half);
    s->set_exact(half == 0);
  };
  add(p.add_by_nodes(), "", 4, 1, 1, 0);
  add(p.add_by_nodes(), "", 4, 2, 2. / 3, 0);
  add(p.add_by_nodes(), "", 4, 3, 1 - 2.5e-9, 0);
  add(p.add_by_domain(), "zone", 2, 1, 1, 0);
  add(p.add_by_domain(), "rack", 900, 2, 0.97525, 0.002);
  const auto price = [&](const char* policy, double memory, double restored, unsigned any,
                         std::vector<double> survival) {
    v1::PolicyPrice* to = p.add_policies();
    to->set_policy(policy);
    to->set_in_force(p.policies_size() == 1);
    to->set_memory(memory);
    to->set_sent(any);
    to->set_encoded(restored > 1 ? any : 0);
    to->set_restored(restored);
    to->set_restore_seconds(restored / 4);
    to->set_encode_seconds(restored > 1 ? any / 16. : 0);
    to->set_survives_any(any);
    to->set_fatal_domains(restored > 1 ? 2 : 0);
    to->set_groups(restored > 1 ? 3 : 0);
    to->set_least_group(restored > 1 ? 4 : 0);
    to->set_largest_group(restored > 2 ? 5 : restored > 1 ? 4 : 0);
    for (unsigned k = 1; k <= survival.size(); ++k) {
      add(to->add_survival(), "", 4, k, survival[k - 1], 0);
    }
  };
  p.set_node_bytes(268435456);
  p.set_price_basis("1 GiB/s assumed; parity at 4 GiB/s a core assumed");
  price("replicate(2)", 1, 1, 1, {1, 2. / 3, 0, 0});
  price("replicate(1)", 0, 0, 0, {0, 0, 0, 0});
  price("rs(2+2)", 1, 2, 2, {1, 1, 1 - 2.5e-9, 0});
  price("rs(2+1)", 0.5, 3, 1, {1, 1. / 3});
  return p;
}

v1::JobCheckpoints Checkpoints() {
  v1::JobCheckpoints c;
  c.set_job("gpt-large");
  c.set_generation(3);
  c.set_copies(2);
  c.set_redundancy("replicate(2)");
  c.set_newest_step(182442);
  c.set_committed_step(182441);
  c.set_verified_step(182000);
  c.set_verify_after_steps(100);
  c.set_ckpt_dir("/mnt/ckpt");
  c.set_shards_damaged(3);
  c.set_shards_repaired(2);
  c.set_anomalies(1);
  c.set_anomaly_step(181000);
  c.set_anomaly_why("loss is NaN");
  c.add_suspect_nodes("n2");
  v1::Cut* cut = c.add_given_up();
  cut->set_generation(2);
  cut->set_step(180500);
  const auto add = [&c](std::int64_t step, const char* trust, const char* tier, unsigned copies) {
    v1::JobCheckpoint* item = c.add_items();
    item->set_step(step);
    item->set_generation(3);
    item->set_trust(trust);
    item->set_tier(tier);
    item->set_least_copies(copies);
    item->set_bytes(copies == 0 ? 0 : 6144);
  };
  add(182442, "captured", "memory", 1);
  add(182441, "committed", "memory", 1);
  add(182000, "verified", "files", 0);
  v1::RankCopies* rank = c.add_ranks();
  for (const char* node : {"n0", "n2"}) rank->add_nodes(node);
  rank = c.add_ranks();
  rank->set_rank(1);
  rank->add_nodes("n1");
  rank->add_damaged("n3");
  return c;
}

v1::LossForecast Loss(bool all) {
  v1::LossForecast f;
  f.set_job("gpt-large");
  f.add_lost("n1");
  f.set_committed_step(182441);
  f.set_newest_step(182442);
  f.set_detect_seconds(1.5);
  if (all) {
    f.add_lost("n3");
    f.set_step(-1);
    f.set_state("WAITING");
    f.add_ranks_lost(2);
    f.set_why("every copy of rank 2 goes with these nodes, and no older step is complete");
    return f;
  }
  f.set_recoverable(true);
  f.set_step(182441);
  f.set_state("ACTIVATING");
  for (const char* member : {"n0", "n4", "n2", "n3"}) f.add_members(member);
  for (int rank = 0; rank < 4; ++rank) {
    v1::ShardSource* s = f.add_sources();
    s->set_rank(rank);
    s->set_node(f.members(rank));
    s->set_tier(rank == 1 ? "peer" : "local");
    s->set_source_node(rank == 1 ? "n3" : f.members(rank));
    s->set_source_rank(rank == 1 ? 3 : rank);
    s->set_bytes(1536);
    s->set_choices(rank == 1 ? 1 : 2);
    s->set_why(rank == 1 ? "not in this node's memory; the only copy left"
                         : "in this node's own memory: nothing is moved");
  }
  f.set_bytes_to_move(1536);
  f.set_bytes_to_copy(3072);
  f.set_estimated_seconds(0.31);
  f.set_basis("1 GiB/s assumed, 0.31 s for the switch: the median of 2 recoveries of this job");
  f.set_why("every rank's state of step 182441 is left");
  return f;
}

v1::JobStatus Gpt() {
  v1::JobStatus job;
  job.set_job("gpt-large");
  job.set_state("RUNNING");
  job.set_reason("node_lost");
  job.set_message("n2 took the place of n1");
  job.set_generation(3);
  job.set_nodes(2);
  job.set_min_nodes(2);
  job.set_max_nodes(4);
  job.set_spares(1);
  job.set_world_size(4);
  job.set_step(182442);
  job.set_committed_step(182441);
  job.set_restarts(1);
  job.set_max_restarts(3);
  job.set_lost_capacity(1);
  job.set_submitted("2026-01-31T14:02:11.482Z");
  job.set_age_seconds(27600);
  job.add_members("n0");
  job.add_members("n2");
  job.set_command("python train.py --lr 0.1");
  job.set_log_dir("/tmp/logs");
  job.set_seconds_lost(1.7);
  job.set_steps_lost(1);
  for (int rank = 0; rank < 4; ++rank) {
    v1::RankStatus* r = job.add_ranks();
    r->set_rank(rank);
    r->set_local_rank(rank % 2);
    r->set_node(rank < 2 ? "n0" : "n2");
    r->set_pid(1000 + rank);
    r->set_state(rank == 3 ? "EXITED" : "RUNNING");
    r->set_exit_code(rank == 3 ? -9 : 0);
  }
  v1::FaultStatus* fault = job.add_faults();
  fault->set_id(1);
  fault->set_reason("worker_killed");
  fault->set_subject("rank 1 on n0");
  fault->set_evidence("signal=SIGKILL");
  fault->set_action("restart from step 181,999");
  fault->set_detected("2026-01-31T15:00:00.000Z");
  fault->set_detect_seconds(0.004);
  fault->set_recovery_seconds(0.19);
  fault->set_generation_before(1);
  fault->set_generation_after(2);
  fault->set_step_before(182000);
  fault->set_step_after(181999);
  fault->set_steps_lost(1);
  fault = job.add_faults();
  fault->set_id(2);
  fault->set_reason("node_lost");
  fault->set_subject("node n1");
  fault->set_evidence("silent_ms=1510 lease_ms=1500");
  fault->set_action("spare n2");
  fault->set_detected("2026-01-31T16:00:00.000Z");
  fault->set_detect_seconds(-1);
  fault->set_recovery_seconds(-1);
  fault->set_generation_before(2);
  fault->set_generation_after(3);
  fault->set_step_before(182440);
  fault->set_step_after(-1);
  fault->set_steps_lost(-1);
  return job;
}

v1::JobStatus Bert() {
  v1::JobStatus job;
  job.set_job("bert");
  job.set_state("FAILED");
  job.set_reason("restarts_exhausted");
  job.set_message("rank 0 on n0 failed 2 times, 1 allowed");
  job.set_generation(2);
  job.set_min_nodes(1);
  job.set_max_nodes(1);
  job.set_world_size(1);
  job.set_step(-1);
  job.set_committed_step(-1);
  job.set_restarts(1);
  job.set_max_restarts(1);
  job.set_exit_code(1);
  job.set_submitted("2026-01-31T13:00:00.000Z");
  job.set_age_seconds(59);
  job.set_ended("2026-01-31T13:00:59.000Z");
  job.set_memory_kept_until("2026-01-31T14:00:59.000Z");
  job.set_lost_capacity(1);
  v1::FaultStatus* fault = job.add_faults();  // of a script that tells of no steps
  fault->set_id(1);
  fault->set_reason("worker_killed");
  fault->set_subject("rank 0 on n0");
  fault->set_action("restart in place");
  fault->set_detected("2026-01-31T13:00:30.000Z");
  fault->set_recovery_seconds(0.03);
  fault->set_generation_before(1);
  fault->set_generation_after(2);
  fault->set_step_before(-1);
  fault->set_step_after(-1);
  fault->set_steps_lost(-1);
  job.set_command("python bert.py");
  job.set_steps_lost(-1);
  v1::RootCause* cause = job.mutable_root_cause();
  cause->set_rank(0);
  cause->set_node("n0");
  cause->set_pid(77);
  cause->set_exit_code(3);
  cause->set_time("2026-01-31T13:00:59.000Z");
  cause->set_error_file("/tmp/logs/error.json");
  cause->set_message("ValueError: no data");
  cause->add_others()->set_rank(1);
  return job;
}

v1::Event MakeEvent(std::uint64_t sequence, const std::string& type, const std::string& severity,
                    const std::string& reason) {
  v1::Event event;
  event.set_sequence(sequence);
  event.set_time("2026-01-31T14:02:1" + std::to_string(sequence % 10) + ".482Z");
  event.set_type(type);
  event.set_severity(severity);
  event.set_reason(reason);
  event.set_rank(-1);
  return event;
}

std::vector<v1::Event> Events() {
  std::vector<v1::Event> events{MakeEvent(1, "node_registered", "INFO", "registered"),
                                MakeEvent(2, "node_lost", "WARNING", "node_lost"),
                                MakeEvent(3, "worker_exited", "ERROR", "worker_killed"),
                                MakeEvent(4, "generation_activated", "INFO", "node_lost")};
  events[0].set_node("n0");
  events[1].set_node("n1");
  events[1].set_message("n1 has been silent for longer than its lease");
  events[1].set_evidence("silent_ms=1510 lease_ms=1500");
  events[2].set_job("gpt-large");
  events[2].set_node("n0");
  events[2].set_rank(1);
  events[2].set_generation(1);
  events[2].set_message("killed by signal 9");
  events[3].set_job("gpt-large");
  events[3].set_generation(3);
  return events;
}

// Fixed replies. Names ask for trouble: node "n9" is refused, job "slow-job" never answers.
class FixedController final : public v1::AdminService::Service {
 public:
  using Context = grpc::ServerContext;

  grpc::Status GetStatus(Context*, const v1::GetStatusRequest*, v1::ClusterStatus* reply) override {
    reply->set_cluster("demo");
    reply->set_version("0.1.0");
    reply->set_started("2026-01-31T12:00:00.000Z");
    reply->set_uptime_seconds(12345);
    reply->set_store("rocksdb ok");
    reply->set_controller_pid(4242);
    reply->set_starts(2);
    *reply->mutable_nodes() = Nodes().items();
    *reply->add_jobs() = Gpt();
    *reply->add_jobs() = Bert();
    return grpc::Status::OK;
  }
  grpc::Status ListJobs(Context*, const v1::ListJobsRequest*, v1::JobList* reply) override {
    *reply->add_items() = Gpt();
    *reply->add_items() = Bert();
    return grpc::Status::OK;
  }
  grpc::Status GetJob(Context* context, const v1::GetJobRequest* request,
                      v1::JobStatus* reply) override {
    if (request->job() == "slow-job") {
      while (!context->IsCancelled()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (std::string("gpt-large").rfind(request->job(), 0) == 0) *reply = Gpt();
    if (request->job() == "bert") *reply = Bert();
    if (request->job() == "\xff")
      return {grpc::StatusCode::INVALID_ARGUMENT, "a job's name is text"};
    if (reply->job().empty()) return {grpc::StatusCode::NOT_FOUND, "no such job"};
    return grpc::Status::OK;
  }
  grpc::Status CancelJob(Context*, const v1::CancelJobRequest* request,
                         v1::CancelJobReply*) override {
    cancelled = request->job() + ": " + request->reason() + (request->forget() ? " (forget)" : "");
    return grpc::Status::OK;
  }
  grpc::Status ListNodes(Context*, const v1::ListNodesRequest*, v1::NodeList* reply) override {
    *reply = Nodes();
    return grpc::Status::OK;
  }
  grpc::Status DrainNode(Context*, const v1::DrainNodeRequest* request,
                         v1::NodeStatus* reply) override {
    if (request->node() == "n2" && !request->allow_pause()) {
      return {grpc::StatusCode::FAILED_PRECONDITION,
              "cannot drain n2: job gpt-large would drop below its minimum of 2 nodes\n"
              "wait for capacity, or accept a pause: everstep node drain n2 --allow-pause"};
    }
    *reply = Node(request->node(), "DRAINING", request->reason());
    return grpc::Status::OK;
  }
  grpc::Status UndrainNode(Context*, const v1::UndrainNodeRequest* request,
                           v1::NodeStatus* reply) override {
    *reply = Node(request->node(), "ALIVE", "undrained");
    return grpc::Status::OK;
  }
  grpc::Status WatchEvents(Context*, const v1::WatchEventsRequest* request,
                           grpc::ServerWriter<v1::Event>* writer) override {
    std::vector<v1::Event> fitting;
    for (const v1::Event& event : Events()) {
      if (event.sequence() < request->since_sequence()) continue;
      if (!request->job().empty() && event.job() != request->job()) continue;
      if (!request->node().empty() && event.node() != request->node()) continue;
      fitting.push_back(event);
    }
    const std::size_t skip = request->limit() > 0 && request->limit() < fitting.size()
                                 ? fitting.size() - request->limit()
                                 : 0;
    for (std::size_t i = skip; i < fitting.size(); ++i) writer->Write(fitting[i]);
    return grpc::Status::OK;
  }
  grpc::Status FollowJob(Context* context, const v1::FollowJobRequest*,
                         grpc::ServerWriter<v1::JobStatus>* writer) override {
    v1::JobStatus job = Gpt();
    writer->Write(job);
    job.set_step(182500);
    writer->Write(job);
    while (!context->IsCancelled()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return grpc::Status::CANCELLED;
  }
  grpc::Status TailJobLogs(Context*, const v1::TailJobLogsRequest* request,
                           grpc::ServerWriter<v1::JobLogLines>* writer) override {
    for (int rank = 0; rank < 2; ++rank) {
      if (request->rank() >= 0 && request->rank() != rank) continue;
      v1::JobLogLines lines;
      lines.set_rank(rank);
      lines.set_node("n0");
      lines.set_generation(3);
      lines.set_from_stderr(rank == 1);
      lines.set_data("step 1 loss 4.2\nstep 2 loss \"4.1\"\n");
      writer->Write(lines);
    }
    return grpc::Status::OK;
  }
  grpc::Status GetPlacement(Context*, const v1::GetPlacementRequest* request,
                            v1::CheckpointPlacement* reply) override {
    *reply = Placement();
    while (reply->by_nodes_size() > static_cast<int>(request->max_lost())) {
      reply->mutable_by_nodes()->RemoveLast();
    }
    return grpc::Status::OK;
  }
  grpc::Status GetCheckpoints(Context*, const v1::GetCheckpointsRequest*,
                              v1::JobCheckpoints* reply) override {
    *reply = Checkpoints();
    return grpc::Status::OK;
  }
  grpc::Status RollBack(Context*, const v1::RollBackRequest* request,
                        v1::RollBackReply* reply) override {
    if (!request->verified() && request->step() != 182000) {
      return {grpc::StatusCode::FAILED_PRECONDITION,
              "step 7 of job 'gpt-large' is neither whole in memory nor in a checkpoint directory\n"
              "hint: there are: 182000"};
    }
    reply->set_step(182000);
    reply->set_from_step(182442);
    reply->set_generation(4);
    return grpc::Status::OK;
  }
  grpc::Status ReportAnomaly(Context*, const v1::ReportAnomalyRequest*,
                             v1::ReportAnomalyReply* reply) override {
    reply->set_step(182442);
    return grpc::Status::OK;
  }
  grpc::Status ForetellLoss(Context*, const v1::ForetellLossRequest* request,
                            v1::LossForecast* reply) override {
    for (const std::string& node : request->nodes()) {
      if (node == "n9") {
        return {grpc::StatusCode::NOT_FOUND,
                "no node is named \"n9\"\nhint: everstep node list shows the nodes"};
      }
    }
    *reply = Loss(request->nodes_size() > 1 || request->count() > 1);
    if (request->count() > 0) {
      v1::Survival* any = reply->mutable_survival();
      any->set_domains(4);
      any->set_lost(request->count());
      any->set_probability(2. / 3);
      any->set_exact(true);
    }
    return grpc::Status::OK;
  }
  grpc::Status Drill(Context*, const v1::DrillRequest* request, v1::DrillReply* reply) override {
    if (request->rank() > 3) {
      return {grpc::StatusCode::NOT_FOUND, "job gpt-large has no rank 9: its ranks are 0 to 3"};
    }
    drilled = request->signal();
    reply->set_node("n0");
    reply->set_pid(1000 + request->rank());
    return grpc::Status::OK;
  }

  std::string cancelled;
  int drilled = 0;
};

// Words of a line; quotes group, nothing else is special.
std::vector<std::string> Words(const std::string& line) {
  std::vector<std::string> words;
  std::string word;
  bool quoted = false;
  bool open = false;
  for (const char c : line) {
    if (c == '"') {
      quoted = !quoted;
      open = true;
    } else if (c == ' ' && !quoted) {
      if (open) words.push_back(word);
      word.clear();
      open = false;
    } else {
      word += c;
      open = true;
    }
  }
  if (open) words.push_back(word);
  return words;
}

std::string Replace(std::string text, const std::string& from, const std::string& to) {
  for (std::size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) {
    text.replace(at, from.size(), to);
  }
  return text;
}

class CliTranscripts : public ::testing::Test {
 protected:
  void SetUp() override {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
    address_ = "127.0.0.1:" + std::to_string(port);
    char state[] = "/tmp/cli_verbs_XXXXXX";
    ASSERT_NE(::mkdtemp(state), nullptr);
    state_ = state;
  }
  void TearDown() override {
    server_->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(5));
    fs::remove_all(state_);
  }

  struct Ran {
    int code = 0;
    std::string out;
    std::string err;
  };
  Ran Run(const std::vector<std::string>& args, bool with_controller = true,
          std::size_t width = 0) {
    Ran ran;
    Io io;
    io.out = [&](std::string_view text) { ran.out += text; };
    io.err = [&](std::string_view text) { ran.err += text; };
    io.width = width;
    Environment environment{{"XDG_STATE_HOME", state_}};
    if (with_controller) environment["EVERSTEP_CONTROLLER"] = address_;
    ran.code = RunCli("everstep", args, environment, &io);
    return ran;
  }

  std::string Transcript(const std::string& command) {
    std::vector<std::string> words = Words(command);
    bool with_controller = true;
    std::size_t width = 0;
    while (!words.empty() && words[0] != "everstep") {  // "env -u": without a controller
      if (words[0] == "NOCONTROLLER=1") with_controller = false;
      if (words[0].rfind("COLUMNS=", 0) == 0) width = std::stoul(words[0].substr(8));
      words.erase(words.begin());
    }
    words.erase(words.begin());
    const Ran ran = Run(words, with_controller, width);
    std::string text = ran.out;
    if (!text.empty() && text.back() != '\n') text += "(no line feed)\n";
    std::istringstream err(ran.err);
    for (std::string line; std::getline(err, line);) text += "2> " + line + "\n";
    if (ran.code != 0) text += "exit " + std::to_string(ran.code) + "\n";
    return Replace(Replace(text, address_, "127.0.0.1:PORT"), state_, "STATE");
  }

  void Check(const std::string& name) {
    const std::string path = kSource + "tests/unit/cli_golden/" + name + ".txt";
    std::ifstream in(path);
    ASSERT_TRUE(in) << path;
    std::string wanted;
    std::string got;
    bool head = true;  // comments before the first command
    int commands = 0;
    for (std::string line; std::getline(in, line);) {
      wanted += line + "\n";
      if (line.rfind("$ ", 0) == 0) {
        if (!head) got += "\n";
        head = false;
        got += line + "\n" + Transcript(line.substr(2));
        ++commands;
      } else if (head) {
        got += line + "\n";
      }
    }
    EXPECT_GT(commands, 0) << path;
    if (Rewrite()) {
      std::ofstream(path) << got;
      return;
    }
    // Blank lines between commands are free.
    EXPECT_EQ(got, wanted) << "if the new text is meant: cli_verbs_test --rewrite";
  }

  FixedController service_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
  std::string state_;
};

TEST_F(CliTranscripts, Status) {
  Check("status");
}
TEST_F(CliTranscripts, Jobs) {
  Check("job");
  EXPECT_EQ(service_.cancelled, "gpt-large: wrong data");
}
TEST_F(CliTranscripts, Nodes) {
  Check("node");
}
TEST_F(CliTranscripts, Checkpoints) {
  Check("ckpt");
}
// A directory with a whole checkpoint, one with a flipped byte and one that was never sealed.
TEST_F(CliTranscripts, CheckpointFiles) {
  namespace cp = everstep::checkpoint;
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(state_);
  cp::FileTier tier(cp::PosixDisk(), "ckpt");
  for (const Step step : {10, 20, 30}) {
    for (Rank rank = 0; rank < (step == 30 ? 1 : 2); ++rank) {
      const cp::HandSlot slot = cp::MakeSlot("gpt", step, 2, rank, 2);
      std::uint64_t written = 0;
      ASSERT_TRUE(tier.WriteShard(slot.content, &written).ok());
    }
    ASSERT_TRUE(tier.Seal(step, 2, 1'700'000'100'000'000'000u, "everstep 0.1.0").ok());
  }
  const std::string file = "ckpt/" + cp::CheckpointName(20, 2) + "/" + cp::ShardFileName(1, 2);
  std::fstream flip(file, std::ios::in | std::ios::out | std::ios::binary);
  flip.seekp(-700, std::ios::end);
  flip.put('!');
  flip.close();
  Check("ckpt_files");
  std::filesystem::current_path(before);
}
// toy.csv: a model of eight layers that two nodes hold.
void WriteToyProfile() {
  const std::string head =
      "everstep-profile 1\nmodel = toy\nmicrobatch = 2\ndevice-memory-mib = 16384\n"
      "layer,forward_ms,backward_ms,optimizer_ms,activation_mib,output_mib,parameters\n";
  std::string layers;
  for (int l = 0; l < 8; ++l) {
    layers +=
        std::to_string(l) + (l == 0 ? ",2,4,3,64,8,150000000\n" : ",10,20,3,256,8,150000000\n");
  }
  std::ofstream("toy.csv") << head << layers;
  std::ofstream("wrong.csv") << head << "0,10,-20,3,256,8,150000000\n";
}
TEST_F(CliTranscripts, Plans) {
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(state_);
  WriteToyProfile();
  Check("plan");
  std::filesystem::current_path(before);
}
TEST_F(CliTranscripts, Simulations) {
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(state_);
  WriteToyProfile();
  std::ofstream model("even.txt");
  model << "everstep-model 1\nmodel = even\nbatch = 128\nleast-nodes = 2\nreconfigure-s = 2\n"
           "checkpoint-s = 5\nrestart-s = 60\nrebalance-s = 20\nredundant-stages = 2\n"
           "nodes,grid,templates,redundant\n";
  for (int n = 4; n <= 8; ++n)
    model << n << ',' << 5 * n << ',' << 5 * n << ',' << n / 2 * 5 << '\n';
  model.close();
  std::ofstream trace("capacity.csv");
  trace << "t_ms,event,node\n";
  for (int n = 1; n <= 8; ++n) trace << "0,add,node" << n << '\n';
  trace << "1000000,remove,node3\n1900000,remove,node5\n1900400,remove,node6\n"
           "2400000,add,node9\n3600000,end,\n";
  trace.close();
  Check("simulate");
  std::filesystem::current_path(before);
}
TEST_F(CliTranscripts, Events) {
  Check("events");
}
TEST_F(CliTranscripts, Logs) {
  Check("logs");
}
TEST_F(CliTranscripts, Drills) {
  Check("drill");
  EXPECT_EQ(service_.drilled, 11) << "the last one asks for SEGV";
}
TEST_F(CliTranscripts, Errors) {
  Check("errors");
}
TEST_F(CliTranscripts, Clusters) {
  Check("cluster");
}
TEST_F(CliTranscripts, Help) {
  Check("help");
}

TEST_F(CliTranscripts, AnAbsentControllerIsRetriedAndThenNamed) {
  server_->Shutdown(std::chrono::system_clock::now());
  const Ran ran = Run({"status", "--timeout", "300ms"});
  EXPECT_EQ(ran.code, 5);
  EXPECT_EQ(ran.out, "");
  EXPECT_EQ(
      ran.err.rfind("error: no controller answers at " + address_ + " (EVERSTEP_CONTROLLER)", 0),
      0u)
      << ran.err;
}

TEST_F(CliTranscripts, TheControllerOfAListIsTheOneThatAnswers) {
  const Ran ran = Run({"node", "list", "-o", "name", "--controller", "127.0.0.1:1," + address_});
  EXPECT_EQ(ran.out, "n0\nn1\nn2\n") << ran.err;
}

TEST_F(CliTranscripts, TheReferencePageIsWhatTheTreeSays) {
  const std::string path = kSource + "docs/reference/cli.md";
  const std::string page = Run({"docs"}).out;
  if (Rewrite()) std::ofstream(path) << page;
  std::ifstream in(path);
  std::stringstream there;
  there << in.rdbuf();
  EXPECT_EQ(there.str(), page) << "everstep docs > docs/reference/cli.md";
}

}  // namespace
}  // namespace everstep::cli
