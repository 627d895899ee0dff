"""Sweeps: many trainings of one recipe, chosen by Optuna, on one machine or several."""
