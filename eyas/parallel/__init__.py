"""One text's keys over several processes: Tree Attention (arXiv 2408.04093) joined with draft trees."""
