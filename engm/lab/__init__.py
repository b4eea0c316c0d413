"""What the notebooks run on: their parameters, runs and page; studies, exercises and widgets."""
