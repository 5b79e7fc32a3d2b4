"""Amazon SageMaker training jobs: requests, words, logs. The backend is launcher/backends/sagemaker.py."""
