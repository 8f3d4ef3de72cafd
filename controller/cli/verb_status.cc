// `everstep status`.
#include "controller/cli/verbs.h"

namespace everstep::cli {

VerbResult RunStatus(Context& context) {
  return context.OnceOrWatch([&](AdminClient* client) -> Result<std::string> {
    Result<v1::ClusterStatus> status = client->GetStatus();
    if (!status.ok()) return status.error();
    switch (context.output) {
      case Output::kJson: return ToJson("ClusterStatus", status.value());
      case Output::kJsonl: return ToJsonLine(status.value());
      case Output::kName: return status.value().cluster() + "\n";
      default: return RenderStatus(status.value(), context.render);
    }
  });
}

}  // namespace everstep::cli
