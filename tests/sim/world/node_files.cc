// A simulated node and the checkpoint directory: its agent writes steps there, and reads there what
// no memory has any more.
#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "tests/sim/world/node.h"

namespace everstep::sim {

const controller::JobSpec* SimNode::WithFiles(const JobId& job) const {
  for (const SimJob& known : env_.options->jobs) {
    if (known.spec.job == job && !known.spec.ckpt_dir.empty()) return &known.spec;
  }
  return nullptr;
}

std::vector<HeldShard> SimNode::Found(const JobId& job, const std::vector<Cut>& given_up) const {
  std::vector<HeldShard> found = Verified(job);
  if (WithFiles(job) == nullptr) return found;
  const std::vector<HeldShard> files = env_.files->Survey(job, given_up);
  found.insert(found.end(), files.begin(), files.end());
  return found;
}

void SimNode::Persist(const agent::PersistStep& asked) {
  auto done = std::make_shared<agent::Persisted>();
  done->job = asked.job;
  done->generation = asked.generation;
  done->step = asked.step;
  auto copies = std::make_shared<std::vector<HeldShard>>();
  const std::vector<HeldShard> here = Verified(asked.job);
  for (const Rank rank : asked.ranks) {
    const auto slot = std::find_if(here.begin(), here.end(), [&](const HeldShard& s) {
      return s.rank == rank && s.step == asked.step && s.generation == asked.generation;
    });
    if (slot == here.end()) {
      done->error = fmt::format("rank {} is not in this node's memory any more", rank);
    } else {
      copies->push_back(*slot);
    }
  }
  if (!done->error.empty()) copies->clear();
  WriteNext(done, copies, asked.verified);
}

void SimNode::WriteNext(const std::shared_ptr<agent::Persisted>& done,
                        const std::shared_ptr<std::vector<HeldShard>>& copies,
                        const Cut& verified) {
  AfterAgent(Draw(2, 120), "files", [this, done, copies, verified] {
    if (!copies->empty()) {
      if (!env_.files->Write(env_.timeline->now(), done->job, copies->back())) {
        done->error = "No space left on device";
        copies->clear();
      } else {
        done->bytes += copies->back().bytes;
        copies->pop_back();
        return WriteNext(done, copies, verified);
      }
    }
    if (done->error.empty()) {
      done->sealed =
          env_.files->Seal(env_.timeline->now(), done->job, done->generation, done->step);
      if (!done->sealed) done->missing = "some ranks' files";
    }
    if (done->sealed) {
      env_.truth->Count("checkpoints sealed");
      env_.files->Prune(done->job, 3, verified);
    }
    Tell(*done);
  });
}

// Before its workers start, what they are to restore from files; a file that does not serve is a
// start that failed.
void SimNode::LoadFiles(const agent::Activate& activate) {
  AfterAgent(Draw(5, 200), "reads files", [this, activate] {
    const auto failed = [&](const std::string& why) {
      for (const WorkerPlan& worker : activate.plan.workers) {
        Tell(agent::WorkerStartFailed{activate.job, activate.generation, worker.rank, why});
      }
    };
    KeeperJob* job = FindJob(activate.job);
    if (job == nullptr || job->generation != activate.generation) {
      return failed("the generation is over");
    }
    for (const WorkerPlan& worker : activate.plan.workers) {
      const RestorePlan& want = worker.restore;
      if (!want.file) continue;
      auto shard = env_.files->Read(activate.job, want.shard_generation, want.step, want.shard_rank,
                                    want.crc_root);
      if (!shard) {
        env_.truth->Count("file restores failed");
        return failed("the checkpoint's file does not serve");
      }
      shard->file = false;
      job->memory.Restore(worker.rank, *shard);
      env_.truth->Count("restores from files");
    }
    ForkAll(activate);
  });
}

}  // namespace everstep::sim
