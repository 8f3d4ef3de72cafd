// everstep-run reads torchrun's command line as torchrun does.
#include "worker/launcher/flags.h"

#include <fstream>
#include <sstream>

#include <gtest/gtest.h>

#include "worker/launcher/flag_table.h"

namespace everstep::launcher {
namespace {

using Words = std::vector<std::string>;

LaunchFlags Good(const Words& words, const Environment& environment = {}) {
  const ParseResult result = ParseFlags(words, environment);
  EXPECT_EQ(result.kind, ParseKind::kRun) << result.error;
  return result.flags;
}

std::string Bad(const Words& words, const Environment& environment = {}) {
  const ParseResult result = ParseFlags(words, environment);
  EXPECT_EQ(result.kind, ParseKind::kError);
  EXPECT_EQ(result.error.rfind("everstep-run: ", 0), 0U) << result.error;
  return result.error;
}

bool Has(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

TEST(LauncherFlags, DefaultsAreTorchruns) {
  const LaunchFlags f = Good({"train.py"});
  EXPECT_EQ(f.min_nodes, 1U);
  EXPECT_EQ(f.max_nodes, 1U);
  EXPECT_EQ(f.workers, (WorkerCount{WorkerCountKind::kNumber, 1}));
  EXPECT_EQ(f.rdzv_backend, "static");
  EXPECT_EQ(f.rdzv_id, "none");
  EXPECT_EQ(f.max_restarts, 0);
  EXPECT_FALSE(f.max_restarts_given);
  EXPECT_EQ(f.role, "default");
  EXPECT_EQ(f.master_addr, "127.0.0.1");
  EXPECT_FALSE(f.master_port.has_value());
  EXPECT_EQ(f.shutdown_timeout_seconds, 30U);
  EXPECT_EQ(f.signals_to_handle, (Words{"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"}));
  EXPECT_EQ(f.script, "train.py");
  EXPECT_TRUE(f.script_args.empty());
}

TEST(LauncherFlags, BothSpellingsAndBothFormsMeanTheSame) {
  for (const Words& words :
       {Words{"--nproc-per-node", "4", "t.py"}, Words{"--nproc_per_node", "4", "t.py"},
        Words{"--nproc-per-node=4", "t.py"}, Words{"--nproc_per_node=4", "t.py"},
        Words{"--nproc", "4", "t.py"}}) {
    EXPECT_EQ(Good(words).workers.number, 4U) << words.front();
  }
}

TEST(LauncherFlags, EverythingAfterTheScriptIsTheScripts) {
  const LaunchFlags f = Good({"--nnodes=2", "t.py", "--nnodes", "9", "--lr=1", "-m", "--help"});
  EXPECT_EQ(f.max_nodes, 2U);
  EXPECT_EQ(f.script_args, (Words{"--nnodes", "9", "--lr=1", "-m", "--help"}));
  EXPECT_EQ(Good({"--", "-odd.py", "a"}).script, "-odd.py");
  EXPECT_EQ(Good({"t.py", "--", "--x", "--"}).script_args, (Words{"--x", "--"}));
}

TEST(LauncherFlags, NodesAreANumberOrARange) {
  const LaunchFlags f = Good({"--nnodes=2:8", "t.py"});
  EXPECT_EQ(f.min_nodes, 2U);
  EXPECT_EQ(f.max_nodes, 8U);
  EXPECT_TRUE(Has(Bad({"--nnodes=8:2", "t.py"}), "did you mean 2:8"));
  EXPECT_TRUE(Has(Bad({"--nnodes=0", "t.py"}), "from 1 to 65536"));
  EXPECT_TRUE(Has(Bad({"--nnodes=1:2:3", "t.py"}), "MIN:MAX"));
  EXPECT_TRUE(Has(Bad({"--nnodes=", "t.py"}), "MIN:MAX"));
}

TEST(LauncherFlags, WorkersAreANumberOrAKindOfDevice) {
  const MachineFacts machine{.cpus = 6, .gpus = 2, .xpus = 0};
  const auto workers = [&](const std::string& text) {
    return ResolveWorkers(Good({"--nproc-per-node=" + text, "t.py"}).workers, machine).workers;
  };
  EXPECT_EQ(workers("3"), 3U);
  EXPECT_EQ(workers("cpu"), 6U);
  EXPECT_EQ(workers("gpu"), 2U);
  EXPECT_EQ(workers("auto"), 2U);
  EXPECT_EQ(ResolveWorkers({WorkerCountKind::kAuto, 0}, {.cpus = 5}).workers, 5U);
  EXPECT_TRUE(Has(ResolveWorkers({WorkerCountKind::kGpu, 0}, {.cpus = 5}).error, "shows no gpu"));
  EXPECT_TRUE(Has(Bad({"--nproc-per-node=tpu", "t.py"}), "auto, cpu, gpu, xpu"));
}

TEST(LauncherFlags, TheEnvironmentGivesDefaultsAndTheCommandLineWins) {
  const Environment environment = {{"PET_NNODES", "1:4"},
                                   {"PET_NPROC_PER_NODE", "2"},
                                   {"PET_MODULE", "1"},
                                   {"PET_STANDALONE", "0"},
                                   {"PET_MAX_RESTARTS", "0"}};
  const LaunchFlags f = Good({"--nproc-per-node=3", "pkg.train"}, environment);
  EXPECT_EQ(f.max_nodes, 4U);
  EXPECT_EQ(f.workers.number, 3U);
  EXPECT_EQ(f.script_kind, ScriptKind::kModule);
  EXPECT_FALSE(f.standalone);
  EXPECT_TRUE(f.max_restarts_given);
  EXPECT_TRUE(Has(Bad({"t.py"}, {{"PET_NNODES", "many"}}), "PET_NNODES=many"));
  EXPECT_TRUE(Has(Bad({"t.py"}, {{"PET_STANDALONE", "yes"}}), "0 or 1"));
}

TEST(LauncherFlags, ScriptKindsExcludeEachOther) {
  EXPECT_EQ(Good({"-m", "pkg"}).script_kind, ScriptKind::kModule);
  EXPECT_EQ(Good({"--no_python", "/bin/true"}).script_kind, ScriptKind::kProgram);
  EXPECT_EQ(Good({"--run-path", "--no-python", "/t.py"}).script_kind, ScriptKind::kRunPath);
  EXPECT_TRUE(Has(Bad({"-m", "--no-python", "x"}), "contradict"));
}

TEST(LauncherFlags, StreamsAreForAllOrForEachLocalRank) {
  EXPECT_EQ(Good({"-r3", "-t", "1", "t.py"}).redirects.For(7), 3);
  EXPECT_EQ(Good({"-r=2", "t.py"}).redirects.all, 2);
  EXPECT_EQ(Good({"-mt3", "pkg"}).tee.all, 3);
  const LaunchFlags f = Good({"--tee=0:1,2:3", "t.py"});
  EXPECT_EQ(f.tee.For(0), 1);
  EXPECT_EQ(f.tee.For(1), 0);
  EXPECT_EQ(f.tee.For(2), 3);
  EXPECT_TRUE(Has(Bad({"--tee=4", "t.py"}), "3 (both)"));
  EXPECT_TRUE(Has(Bad({"--redirects=0:1,", "t.py"}), "local rank"));
}

TEST(LauncherFlags, RendezvousSettings) {
  const LaunchFlags f = Good({"--rdzv_backend=c10d", "--rdzv-endpoint", "h:1", "--rdzv-id=j7",
                              "--rdzv-conf= join_timeout=5 ,a = b=c", "t.py"});
  EXPECT_EQ(f.rdzv_endpoint, "h:1");
  EXPECT_EQ(f.rdzv_id, "j7");
  EXPECT_EQ(f.rdzv_conf, (std::map<std::string, std::string>{{"join_timeout", "5"}, {"a", "b=c"}}));
  EXPECT_TRUE(Has(Bad({"--rdzv-conf=join_timeout=soon", "t.py"}), "seconds from 0"));
  EXPECT_TRUE(Has(Bad({"--rdzv-conf=x", "t.py"}), "KEY=VALUE"));
  EXPECT_TRUE(Has(Bad({"--rdzv-backend=etcd", "t.py"}), "use c10d"));
  EXPECT_TRUE(Has(Bad({"--standalone", "--nnodes=2", "t.py"}), "--standalone is one node"));
  EXPECT_TRUE(Has(Bad({"--nnodes=2", "--node-rank=2", "t.py"}), "makes 1 the highest"));
}

TEST(LauncherFlags, ErrorsNameTheFlagAndTheWayOut) {
  EXPECT_TRUE(Has(Bad({}), "no training script"));
  EXPECT_TRUE(Has(Bad({"--nnodes"}), "--nnodes needs a value"));
  EXPECT_TRUE(Has(Bad({"--nnodes", "--standalone", "t.py"}), "--nnodes needs a value"));
  EXPECT_TRUE(Has(Bad({"--learning-rate=1", "t.py"}), "after the script"));
  EXPECT_TRUE(Has(Bad({"--rdzv", "x", "t.py"}), "--rdzv-backend or --rdzv-endpoint"));
  EXPECT_TRUE(Has(Bad({"--standalone=1", "t.py"}), "takes no value"));
  EXPECT_TRUE(Has(Bad({"--max-restarts=-1", "t.py"}), "from 0 to"));
  EXPECT_TRUE(Has(Bad({"--max-restarts", "-1", "t.py"}), "from 0 to"));
  EXPECT_TRUE(Has(Bad({"--master-port=70000", "t.py"}), "65535"));
  EXPECT_TRUE(Has(Bad({"--signals-to-handle=SIGKILL", "t.py"}), "SIGKILL"));
  EXPECT_TRUE(Has(Bad({"--start-method=thread", "t.py"}), "forkserver"));
  EXPECT_TRUE(Has(Bad({"--name=a/b", "t.py"}), "128 characters"));
  EXPECT_TRUE(Has(Bad({""}), "empty"));
}

TEST(LauncherFlags, RedundancyIsCopiesOrParityAndFitsTheNodes) {
  const LaunchFlags copies = Good({"--nnodes=4", "--redundancy=replicate(3)", "t.py"});
  EXPECT_EQ(copies.copies, 3U);
  EXPECT_EQ(copies.parity_states, 0U);
  const LaunchFlags parity = Good({"--nnodes=2:6", "--redundancy", "rs(4+2)", "t.py"});
  EXPECT_EQ(parity.copies, 3U);
  EXPECT_EQ(parity.parity_states, 4U);
  const LaunchFlags one = Good({"--nnodes=4", "t.py"}, {{"EVERSTEP_REDUNDANCY", " xor( 3 + 1 ) "}});
  EXPECT_EQ(one.copies, 2U);
  EXPECT_EQ(one.parity_states, 3U);
  EXPECT_EQ(Good({"--nnodes=4", "t.py"}).copies, 0U) << "the controller's default";
  EXPECT_TRUE(Has(Bad({"--nnodes=3", "--redundancy=rs(4+2)", "t.py"}),
                  "takes 6 nodes and --nnodes asks for up to 3; replicate(3) fits"));
  EXPECT_TRUE(Has(Bad({"--nnodes=5", "--redundancy=xor(8+1)", "t.py"}), "up to 5; xor(4+1) fits"));
  EXPECT_TRUE(Has(Bad({"--nnodes=4", "--redundancy=xor(2+2)", "t.py"}), "write rs(2+2)"));
  EXPECT_TRUE(Has(Bad({"--nnodes=4", "--redundancy=raid5", "t.py"}), "rs(k+r)"));
  EXPECT_TRUE(Has(Bad({"--nnodes=4", "--copies=3", "--redundancy=xor(3+1)", "t.py"}),
                  "contradict each other"));
  EXPECT_EQ(Good({"--nnodes=4", "--copies=2", "--redundancy=replicate(2)", "t.py"}).copies, 2U);
}

TEST(LauncherFlags, FiltersKeepDoubledCommas) {
  EXPECT_EQ(Good({"--duplicate-stdout-filters=a,,b,c", "t.py"}).duplicate_stdout_filters,
            (Words{"a,b", "c"}));
  EXPECT_EQ(Good({"--local_ranks_filter=0,2", "t.py"}).local_ranks_filter,
            (std::vector<std::int32_t>{0, 2}));
}

TEST(LauncherFlags, ShutdownTimeoutFallsBackToTorchsVariable) {
  const Environment environment = {{"TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "7"}};
  EXPECT_EQ(Good({"t.py"}, environment).shutdown_timeout_seconds, 7U);
  EXPECT_EQ(Good({"--shutdown-timeout=2", "t.py"}, environment).shutdown_timeout_seconds, 2U);
}

TEST(LauncherFlags, HelpAndVersionEndTheReading) {
  EXPECT_EQ(ParseFlags({"-h"}, {}).kind, ParseKind::kHelp);
  EXPECT_EQ(ParseFlags({"--nnodes=2", "--help"}, {}).kind, ParseKind::kHelp);
  EXPECT_EQ(ParseFlags({"--version"}, {}).kind, ParseKind::kVersion);
  EXPECT_TRUE(Has(HelpText(), "--nproc-per-node N|auto|cpu|gpu|xpu"));
}

TEST(LauncherFlags, TheReferencePageListsEveryFlag) {
  std::ifstream file(EVERSTEP_SOURCE_DIR "/docs/reference/flags.md");
  std::stringstream page;
  page << file.rdbuf();
  ASSERT_FALSE(page.str().empty());
  for (const FlagRow& row : kFlagTable) {
    const std::string cell = "`" + std::string(row.name) + (row.takes_value ? " " : "`");
    EXPECT_TRUE(Has(page.str(), cell)) << row.name;
    if (!row.variable.empty()) {
      EXPECT_TRUE(Has(page.str(), "`" + std::string(row.variable) + "`")) << row.variable;
    }
    EXPECT_TRUE(Has(page.str(), row.help)) << row.name;
  }
}

TEST(LauncherFlags, FlagsWithoutEffectAreWarnedAbout) {
  const ParseResult result = ParseFlags({"--rdzv-backend=c10d", "--node-rank=1", "t.py"}, {});
  ASSERT_EQ(result.warnings.size(), 1U);
  EXPECT_TRUE(Has(result.warnings[0], "--node-rank"));
  const ParseResult once = ParseFlags({"--monitor-interval=1", "--monitor-interval=2", "t.py"}, {});
  ASSERT_EQ(once.warnings.size(), 1U);  // said once
}

}  // namespace
}  // namespace everstep::launcher
