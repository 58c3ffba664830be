"""Reports, plots and intervals over what the tasks scored."""
