"""The erasure methods: what each computes, as pure functions over tensors."""
