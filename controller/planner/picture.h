// Pictures of pipelines: for a terminal and as SVG. Pure.
#pragma once

#include <string>
#include <vector>

#include "controller/planner/replan.h"

namespace everstep::planner {

// "1.234 s", "12.3 ms", "4.5 us": three or four digits.
std::string TimeText(std::int64_t ns);
// "12.3 GiB", "512 MiB", "0 B".
std::string SizeText(std::int64_t bytes);
// "1", "1/2 node" (two stages on a node), "2 nodes" (of a stage).
std::string ShapeText(Shape shape);

// As the text of an SVG element.
std::string Escaped(const std::string& text);

// A line for each stage: its nodes, its layers, a bar as long as its time, what its devices hold.
// The slowest stage of each pipeline is marked. `names` by NodeId; one that is missing is "n<id>".
std::string PlanPicture(const Library& library, const Seated& seated,
                        const std::vector<std::string>& names = {});

// The same as one SVG document: a row for each pipeline, a box for each stage.
std::string PlanSvg(const Library& library, const Seated& seated,
                    const std::vector<std::string>& names = {});

}  // namespace everstep::planner
