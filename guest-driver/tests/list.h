/* SPDX-License-Identifier: GPL-2.0 */
/*
 * As much of a circular list as the walk uses, under the kernel's names, so
 * that the walk's logic builds in user space.
 */
#ifndef LACUNA_TESTS_LIST_H
#define LACUNA_TESTS_LIST_H

struct list_head {
	struct list_head *next, *prev;
};

#define list_for_each(pos, head) \
	for (pos = (head)->next; pos != (head); pos = pos->next)

static inline void list_init(struct list_head *list)
{
	list->next = list;
	list->prev = list;
}

static inline void list_remove(struct list_head *entry)
{
	entry->prev->next = entry->next;
	entry->next->prev = entry->prev;
	/* Whoever still follows this entry is to fall over at once. */
	entry->next = NULL;
	entry->prev = NULL;
}

static inline void list_insert_after(struct list_head *entry,
				     struct list_head *at)
{
	entry->next = at->next;
	entry->prev = at;
	at->next->prev = entry;
	at->next = entry;
}

/* The head moves to stand before @first; the order stays what it was. */
static inline void list_rotate_to_front(struct list_head *first,
					struct list_head *head)
{
	head->prev->next = head->next;
	head->next->prev = head->prev;
	list_insert_after(head, first->prev);
}

#endif /* LACUNA_TESTS_LIST_H */
