// Producer in Go: puts jobs on a stream with a plain go-redis client.
//
//	cd examples/producer_go
//	go run . -redis redis://localhost:6379/0 Ada Grace
package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"time"

	"github.com/redis/go-redis/v9"
)

// Job is the wire format: one stream entry with one field, "data", that holds this JSON.
type Job struct {
	ID        string            `json:"id"`
	Type      string            `json:"type"`
	TenantID  string            `json:"tenant_id"`
	ProjectID string            `json:"project_id"`
	Payload   any               `json:"payload"`
	Metadata  map[string]string `json:"metadata"`
	CreatedAt time.Time         `json:"created_at"`
}

// enqueue returns nil once Redis has confirmed the entry. After an error the entry may exist all the same:
// call it again with the same job, so that both entries carry one id.
func enqueue(ctx context.Context, client *redis.Client, stream string, job Job) error {
	data, err := json.Marshal(job)
	if err != nil {
		return err
	}
	// No MaxLen: trimming drops jobs that no worker has run. The service trims what every group has finished.
	return client.XAdd(ctx, &redis.XAddArgs{Stream: stream, Values: map[string]any{"data": data}}).Err()
}

func newID() (string, error) {
	random := make([]byte, 16)
	if _, err := rand.Read(random); err != nil {
		return "", err
	}
	return hex.EncodeToString(random), nil
}

func send(url, stream string, names []string) error {
	options, err := redis.ParseURL(url)
	if err != nil {
		return err
	}
	client := redis.NewClient(options)
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, name := range names {
		id, err := newID()
		if err != nil {
			return err
		}
		job := Job{ID: id, Type: "greet", Payload: map[string]string{"name": name}, CreatedAt: time.Now().UTC()}
		if err := enqueue(ctx, client, stream, job); err != nil {
			return fmt.Errorf("job %s: %w", id, err)
		}
		fmt.Println(id)
	}
	return nil
}

func main() {
	url := flag.String("redis", "redis://localhost:6379/0", "Redis URL")
	stream := flag.String("stream", "stream:story:gen", "stream that the service reads")
	flag.Parse()
	if err := send(*url, *stream, flag.Args()); err != nil {
		log.Fatal(err)
	}
}
