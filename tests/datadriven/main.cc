// everstep_datadriven [--rewrite] FILE...: replays transcripts through the production controller.
#include <memory>

#include "tests/datadriven/cluster.h"
#include "tests/datadriven/replay_files.h"

namespace dd = everstep::datadriven;

int main(int argc, char** argv) {
  return dd::ReplayFiles(argc, argv, [] {
    return [cluster = std::make_shared<dd::Cluster>()](const dd::Command& command) {
      return cluster->Run(command);
    };
  });
}
