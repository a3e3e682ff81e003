"""What is written, shown and shared: accuracies, records of runs and evaluations, model cards, the Hub."""
