// The keeper's Python parts, carried in its program and laid out in the node's folder, so that any
// interpreter of any job can run them with nothing installed.
#pragma once

#include <string>

namespace everstep::keeper {

// FOLDER/python holds sitecustomize.py (the fork server), everstep_script_imports.py (what it
// imports ahead) and everstep_store_host.py.
bool WritePythonFiles(const std::string& folder, std::string* error);

std::string PythonFolder(const std::string& folder);  // first in a fork server's PYTHONPATH
std::string StoreHostProgram(const std::string& folder);
std::string NumaProgram(const std::string& folder);  // binds itself, then becomes the worker

}  // namespace everstep::keeper
