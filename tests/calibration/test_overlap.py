from stages.calibration.overlap import NgramIndex, hashes


def test_a_shared_run_of_tokens_is_found_where_it_begins():
    index = NgramIndex([[1, 2, 3, 4, 5], [9, 8, 7]], size=3)
    assert index.shared([0, 2, 3, 4, 0, 9, 8, 7]) == [1, 5]


def test_the_same_tokens_in_another_order_are_not_shared():
    assert NgramIndex([[1, 2, 3]], size=3).shared([3, 2, 1]) == []
    assert NgramIndex([[0, 0, 1]], size=3).shared([0, 1, 0]) == []


def test_texts_shorter_than_the_run_share_nothing():
    assert NgramIndex([[1, 2]], size=3).shared([1, 2]) == []
    assert len(hashes([1, 2], 3)) == 0


def test_an_empty_index_shares_nothing():
    assert NgramIndex([], size=3).shared([1, 2, 3, 4]) == []
