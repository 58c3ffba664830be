"""What leaves a run for others: the merged model with its proof, and its model card."""
