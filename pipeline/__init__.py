"""Distributed batch inference: parquet shards of images and questions in, answers with key/value statistics out."""
