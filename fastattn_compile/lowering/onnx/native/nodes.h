// The nodes of the library.
#pragma once
#include "node.h"

void add_fma(std::vector<const ort::Op*>& to);
void add_window(std::vector<const ort::Op*>& to);
void add_barnes_hut(std::vector<const ort::Op*>& to);
void add_tree_leaf(std::vector<const ort::Op*>& to);
void add_tree_coarse(std::vector<const ort::Op*>& to);
